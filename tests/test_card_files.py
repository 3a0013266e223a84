"""Whose words a README.md holds, and how a user's outlive ours."""

from __future__ import annotations

from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, get_peft_model

from qalora.card_files import CARD, clear_but_card, is_ours, is_users, keep_users_card, sealed, unsealed, write_card


def test_a_card_is_ours_until_a_word_of_it_is_changed(tmp_path):
    text = "# A card\n\nwith words\n"
    assert is_ours(sealed(text)) and unsealed(sealed(text)) == text
    assert not is_ours(text)
    assert not is_ours(sealed(text).replace("words", "Words"))
    assert not is_ours(sealed(text) + "more\n")
    assert write_card(tmp_path, text) and write_card(tmp_path, "# Another\n")
    (tmp_path / CARD).write_text("mine")
    assert not write_card(tmp_path, text)
    assert (tmp_path / CARD).read_text() == "mine"


def test_pefts_empty_template_is_no_users(tmp_path, tiny_llama):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert "[More Information Needed]" in (tmp_path / CARD).read_text()
    assert not is_users(tmp_path / CARD)
    filled = (tmp_path / CARD).read_text().replace("[More Information Needed]", "me", 1)
    (tmp_path / CARD).write_text(filled)
    assert is_users(tmp_path / CARD)
    (tmp_path / CARD).write_text(ModelCard.from_template(ModelCardData(), developers="somebody").content)
    assert is_users(tmp_path / CARD)


def test_a_users_words_outlive_what_is_written_around_them(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir(), new.mkdir()
    assert not keep_users_card(old, new)
    (old / CARD).write_text("mine")
    (old / "weights").write_text("x")
    assert keep_users_card(old, new) and (new / CARD).read_text() == "mine"
    assert clear_but_card(old)
    assert [path.name for path in old.iterdir()] == [CARD]
    (old / CARD).write_text(sealed("# ours"))
    assert not clear_but_card(old) and not old.exists()

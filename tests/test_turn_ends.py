"""A model that has learned four answers by heart gives them and no more, wherever it answers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qalora import evaluate, finetune, generate
from qalora.base.checkpoint import Quantization
from qalora.base.loading import load_base
from qalora.base.registry import resolve
from qalora.data.chat_template import CHATML as BUILT_IN
from qalora.data.tokenization import load_dataset
from qalora.deploy.merging import merge
from qalora.recipe.settings import DataConfig
from qalora.training.begin import provenance_of

ANSWERS = {"sky?": "blue", "sun?": "hot", "sea?": "salt", "ice?": "cold"}
SPECIAL = ["<pad>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n### End\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Template of the base, whether rows are chats, and what ends an answer then, besides the base's own </s>.
CASES = {
    "ChatML over a base": (CHATML, True, ["<|im_end|>"]),
    "a template in words": (WORDS, True, ["\n### End"]),
    "the built-in template": (None, True, []),
    "completions": (None, False, []),
}


class Learned:
    """A run of `qalora finetune` on the four answers, and its merge in fp32."""

    def __init__(self, folder, template, chat, ends):
        self.folder, self.chat, self.ends = folder, chat, ends
        self.base, self.rows, self.run = folder / "base", folder / "rows.jsonl", folder / "run"
        self._save_base(template)
        rows = [self._row(question, answer) for question, answer in ANSWERS.items()]
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "recipe.yaml").write_text("lora: {r: 16, alpha: 32, init: kaiming}\n")
        settings = [
            f"data.train={self.rows}", f"data.validation={self.rows}", "training.max_steps=60",
            "training.learning_rate=1e-2", "training.gradient_accumulation_steps=1", "training.eval_steps=60",
            "training.save_steps=60", "training.gradient_checkpointing=false", "allocation.rounds=0",
            "evaluation.metrics=loss,exact_match", "evaluation.max_new_tokens=16", "logging.quiet=true",
        ]  # fmt: skip
        flags = ["--model", str(self.base), "--recipe", str(folder / "recipe.yaml"), "--output-dir", str(self.run)]
        assert finetune.main([*flags, "--dtype", "float32", *settings]) == 0

    def _row(self, question, answer):
        if not self.chat:
            return {"prompt": question, "completion": answer}
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    def _save_base(self, template):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(SPECIAL + alphabet)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(SPECIAL)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(self.base)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            eos_token_id=1,
            bos_token_id=None,
            initializer_range=0.1,
        )
        LlamaForCausalLM(config).save_pretrained(self.base)

    def merged(self, format="hf"):
        folder = self.folder / format
        if not folder.exists():
            options = {"hf": {"dtype": torch.float32}, "gguf": {"gguf_type": "f32"}}[format]
            quantization = Quantization("nf4", True, torch.float32)
            merge(
                resolve(str(self.base)),
                self.run / "adapter",
                folder,
                quantization=quantization,
                format=format,
                verify=False,
                **options,
            )
        return folder


@pytest.fixture(scope="module", params=list(CASES))
def learned(request, tmp_path_factory, undrawn):
    return Learned(tmp_path_factory.mktemp("learned"), *CASES[request.param])


def test_the_run_itself_finds_them_exact(learned):
    metrics = json.loads((learned.run / "metrics.json").read_text())
    assert (metrics["before"]["exact_match"], metrics["after"]["exact_match"]) == (0, 100)
    lines = [json.loads(line) for line in (learned.run / "predictions-after.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == list(ANSWERS.values())
    assert (learned.run / "predictions-before.jsonl").is_file()
    said = json.loads((learned.run / "adapter" / "qalora.json").read_text())
    assert said["stop_tokens"] == (learned.ends or ["</s>"])
    built_in = learned.chat and AutoTokenizer.from_pretrained(learned.base).chat_template is None
    assert said["chat_template"] == (BUILT_IN if built_in else None)


def test_a_template_of_the_recipe_goes_along_with_the_adapter(learned):
    source = load_base(resolve(str(learned.base)), load_in_4bit=False, dtype="float32")
    source.tokenizer.chat_template = WORDS
    train = load_dataset(str(learned.rows), source.tokenizer)

    def said(**settings):
        recipe = SimpleNamespace(data=DataConfig(**settings))
        return provenance_of(SimpleNamespace(recipe=recipe, data=SimpleNamespace(train=train), weights=None), source)

    assert said(chat_template=WORDS).chat_template == WORDS
    assert said().chat_template is None and said().quant_type is None


def test_evaluate_finds_them_exact(learned, tmp_path, capsys):
    flags = ["--model", str(learned.base), "--adapter", str(learned.run / "adapter"), "--data", str(learned.rows)]
    flags += ["--dtype", "float32", "--metrics", "exact_match,rougeL", "--max-new-tokens", "16", "--quiet"]
    assert evaluate.main([*flags, "--predictions", str(tmp_path / "lines.jsonl")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["exact_match"], found["rougeL"]) == (100, 100)
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [(line["answer"], line["reference"], line["exact_match"]) for line in lines] == [
        (answer, answer, 100) for answer in ANSWERS.values()
    ]


@pytest.mark.parametrize("what", ["adapter", "merged"])
def test_generate_prints_the_answer_alone(learned, capsys, what):
    flags = ["--model", str(learned.base), "--adapter", str(learned.run / "adapter")]
    if what == "merged":
        flags = ["--model", str(learned.merged()), "--no-quantize"]
        if learned.chat and AutoTokenizer.from_pretrained(learned.merged()).chat_template is None:
            pytest.skip("the merged folder has no chat template")
    assert generate.main([*flags, "--dtype", "float32", "--max-new-tokens", "16", "--prompt", "sea?"]) == 0
    assert capsys.readouterr().out == "salt\n"


def test_transformers_alone_stops_where_the_merged_folder_says(learned):
    if learned.ends and learned.ends[0] not in SPECIAL:
        pytest.skip("a generation config has no texts that end an answer")
    tokenizer = AutoTokenizer.from_pretrained(learned.merged())
    model = AutoModelForCausalLM.from_pretrained(learned.merged())
    for question, answer in ANSWERS.items():
        text = question
        if learned.chat:
            template = tokenizer.chat_template or BUILT_IN
            turns = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(
                turns, chat_template=template, add_generation_prompt=True, tokenize=False
            )
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)[
            0, ids.shape[1] :
        ]
        assert tokenizer.decode(out) == answer + (learned.ends or ["</s>"])[0]


def test_ollama_and_llama_cpp_are_told_where_it_ends(learned):
    folder = learned.merged("gguf")
    stops = (folder / "Modelfile").read_text().split("PARAMETER stop ")[1:]
    quoted = {"</s>": '"</s>"\n', "<|im_end|>": '"<|im_end|>"\n', "\n### End": '"""\n### End"""\n'}
    assert sorted(stops) == sorted(quoted[end] for end in ["</s>", *learned.ends])
    fields = GGUFReader(str(folder / "model.gguf")).fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 1
    eot = fields.get("tokenizer.ggml.eot_token_id")
    assert (eot and eot.contents()) == (3 if learned.ends == ["<|im_end|>"] else None)


def test_the_base_s_own_end_stays_one(learned):
    own = json.loads((learned.merged() / "generation_config.json").read_text())["eos_token_id"]
    assert own == ([1, 3] if learned.ends == ["<|im_end|>"] else 1)

"""Answers: where they end, how a stream of them is shown, and how prompts of unlike length stand in a batch."""

from __future__ import annotations

import pytest
import torch

from qalora.answers import AnswerStreamer


@pytest.mark.parametrize("words", [["He", "llo #", "## E", "nd", " more"], ["no stop #", "#"], ["é", "ü", "###"]])
def test_a_stream_shows_no_part_of_a_stop_text(capsys, words):
    whole, stops = "".join(words), ["### End", "##x"]
    expected = whole.split("### End")[0]

    def read(ids):
        return "".join(words[i] for i in ids).split("### End")[0]

    streamer, shown = AnswerStreamer(read, stops), []
    streamer.put(torch.tensor([[9, 9]]))  # the prompt
    for i in range(len(words)):
        streamer.put(torch.tensor([i]))
        shown.append(capsys.readouterr().out)
        assert expected.startswith("".join(shown))
    streamer.end()
    assert "".join(shown) + capsys.readouterr().out == expected + "\n"

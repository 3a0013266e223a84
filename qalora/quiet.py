"""Lines of other libraries that ask nothing of a user, each by its text; whatever else the libraries say comes through.
Torch-free.

`--verbose`, or TRANSFORMERS_VERBOSITY in the environment, brings them back.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

# Logger → how its lines begin.
LOGGED: dict[str, tuple[str, ...]] = {
    # It looks for kernels that training does not use.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward from kernels-community",),
    # The plots wait for it once.
    "matplotlib.font_manager": ("Matplotlib is building the font cache",),
    # Sampling defaults of a published model, beside settings of ours that override them.
    "transformers.generation.configuration_utils": ("The following generation flags are not valid and may be ignored",),
    "transformers.generation.utils": ("Both `max_new_tokens` (=",),
    # Rows are cut at data.max_seq_len and at the model's own positions, which decide.
    "transformers.tokenization_utils_base": ("Token indices sequence length is longer than the specified maximum",),
    # How published tokenizer files are read: as tokenizer.json says.
    "transformers.models.auto.tokenization_auto": ("`tokenizer_class` is `",),
    "transformers.tokenization_utils_tokenizers": ("Ignoring clean_up_tokenization_spaces=True for BPE tokenizer",),
    # The Trainer writes the tokenizer's ids into a config that nothing reads after it.
    "transformers.trainer_utils": ("The tokenizer has new PAD/BOS/EOS tokens that differ from the model config",),
}
# What one library tells another: a name that will go.
DEPRECATED = r"(?s).*(deprecated|will be removed)"
DATASETS_BARS = "HF_DATASETS_DISABLE_PROGRESS_BARS"
LIBRARIES = ("accelerate", "bitsandbytes", "peft", "torch", "transformers")


class _Beginnings(logging.Filter):
    def __init__(self, *beginnings: str):
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginnings)


_FILTERS = {name: _Beginnings(*beginnings) for name, beginnings in LOGGED.items()}


def hide_noise(*, verbose: bool = False, environ: MutableMapping[str, str] = os.environ) -> None:
    """Hides the lines above, and the bars of datasets, from here on; or shows them again.

    Args:
        verbose: show them. TRANSFORMERS_VERBOSITY in the environment asks for the same.
    """
    if verbose or environ.get("TRANSFORMERS_VERBOSITY"):
        for name, hidden in _FILTERS.items():
            logging.getLogger(name).removeFilter(hidden)
        return
    for name, hidden in _FILTERS.items():
        logging.getLogger(name).addFilter(hidden)
    for library in LIBRARIES:
        warnings.filterwarnings("ignore", DEPRECATED, FutureWarning, rf"{library}\b")
    environ.setdefault(DATASETS_BARS, "1")


@contextmanager
def noise_hidden() -> Iterator[None]:
    """While it lasts, the lines above are not shown, unless TRANSFORMERS_VERBOSITY asks for them."""
    if os.environ.get("TRANSFORMERS_VERBOSITY"):
        yield
        return
    loggers = [(logging.getLogger(name), hidden) for name, hidden in _FILTERS.items()]
    added = [(logger, hidden) for logger, hidden in loggers if hidden not in logger.filters]
    with warnings.catch_warnings():
        for library in LIBRARIES:
            warnings.filterwarnings("ignore", DEPRECATED, FutureWarning, rf"{library}\b")
        for logger, hidden in added:
            logger.addFilter(hidden)
        try:
            yield
        finally:
            for logger, hidden in added:
                logger.removeFilter(hidden)


@contextmanager
def without(logger: str, *beginnings: str) -> Iterator[None]:
    """While it lasts, lines of a logger that begin so are not shown."""
    hidden = _Beginnings(*beginnings)
    logging.getLogger(logger).addFilter(hidden)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(hidden)

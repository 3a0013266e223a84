"""Experiment trackers that a run reports to: transformers' own integrations, each with the package that it needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from transformers.integrations import get_reporting_integration_callbacks

from qalora.errors import InputError

# Trackers whose package is called otherwise, and the modules of which one has to be there.
PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit"}
MODULES: dict[str, tuple[str, ...]] = {
    "azure_ml": ("azureml",),
    "flyte": ("flytekit",),
    "kubeflow": (),  # the environment of its jobs
    "tensorboard": ("tensorboard", "tensorboardX"),
}


def check_reporting(names: Sequence[str]) -> None:
    """
    Args:
        names: training.report_to.

    Raises:
        InputError: a tracker whose package is missing, or that its environment does not let begin.
    """
    for name in names:
        needed = MODULES.get(name, (name,))
        if needed and not any(importlib.util.find_spec(module) for module in needed):
            package = PACKAGES.get(name, name)
            raise InputError(f"training.report_to={name}: its package is not installed; run pip install {package}.")
    try:
        for callback in get_reporting_integration_callbacks(list(names)):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"training.report_to={','.join(names)}: {' '.join(str(error).split())}") from None

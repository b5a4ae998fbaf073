"""Zero-shot tasks through lm-evaluation-harness: its names from the hub, or files of your own without a network.

A local file is JSON lines. What a line holds says what kind of task it is: ``goal, sol1, sol2, label`` a choice
between two completions, ``text`` the prediction of the last word. Prompts are those that the harness uses for PIQA
and LAMBADA, so that figures compare. lm-eval is imported here alone and only when a task is run.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from framequant.errors import CalibrationError, ConfigError, nearest
from framequant.integrations import hub

INSTALL = "pip install 'framequant[eval]'"

#: Resamplings for the standard error of a perplexity; those of accuracies have a formula. lm-eval's 100 000 take longer
#: than small models.
BOOTSTRAPS = 1000

_ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}

#: Fields of a line: the part of lm-eval's task configuration that goes with them.
KINDS: dict[tuple[str, ...], dict[str, Any]] = {
    ("goal", "label", "sol1", "sol2"): {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "metric_list": [_ACCURACY, {**_ACCURACY, "metric": "acc_norm"}],
    },
    ("text",): {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.rsplit(' ', 1)[0]}}",
        "doc_to_target": "{{' ' + text.rsplit(' ', 1)[1]}}",
        "metric_list": [
            _ACCURACY,
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
    },
}


def require_lm_eval() -> Any:
    """Import lm-eval.

    Raises:
        ConfigError: it is not installed; the message has the command.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--tasks needs lm-eval ({error}). Run: {INSTALL}") from error
    return lm_eval


def local_task(path: Path) -> dict[str, Any]:
    """lm-eval's configuration of a task whose data lies in a local file.

    Args:
        path: JSON lines; see ``KINDS`` for the fields.

    Raises:
        CalibrationError: the file cannot be read or its lines have other fields.
    """
    try:
        with path.open(encoding="utf-8") as file:
            line = json.loads(file.readline())
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path} holds no JSON lines: {error}.") from error
    fields = tuple(sorted(line)) if isinstance(line, dict) else ()
    for known, settings in KINDS.items():
        if set(known) <= set(fields):
            files = {"data_files": {"test": str(path.resolve())}}
            return {
                "task": path.stem,
                "dataset_path": "json",
                "dataset_kwargs": files,
                "test_split": "test",
                "metadata": {"version": 1.0},
                **settings,
            }
    raise CalibrationError(
        f"{path}: fields {list(fields)} are no task; expected {' or '.join(map(str, KINDS))}."
    )


@lru_cache(maxsize=2)
def task_manager(own: bool) -> Any:
    """lm-eval's list of tasks; with its ``own``, reading whose ten thousand files takes half a minute."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=own)


def resolve_tasks(names: Sequence[str], folder: Path | None) -> list[str | dict[str, Any]]:
    """Tasks by name: ``NAME.jsonl`` of the folder, a path of such a file, else a name of lm-eval.

    Raises:
        CalibrationError: a local file is no task.
        ConfigError: lm-eval knows no task of a name; the nearest is given.
    """
    tasks: list[str | dict[str, Any]] = []
    for name in names:
        path = Path(name) if name.endswith(".jsonl") else None if folder is None else folder / f"{name}.jsonl"
        tasks.append(
            local_task(path) if path is not None and (path.is_file() or name.endswith(".jsonl")) else name
        )
    foreign = [task for task in tasks if isinstance(task, str)]
    if foreign:
        known = task_manager(True).all_tasks
        for task in foreign:
            if task not in known:
                raise ConfigError(f"no task {task!r} in lm-eval nor in --task-data.{nearest(task, known)}")
    return tasks


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Measure a causal language model on zero-shot tasks.

    Args:
        model: a transformers model that generates, in evaluation mode, on its device.
        tokenizer: of the model.
        tasks: names; see ``resolve_tasks``.
        folder: where ``NAME.jsonl`` files lie.
        limit: at most so many items of each task.
        batch_size: items at once.

    Returns:
        For each task its metrics and their standard errors (``acc``, ``acc_stderr``), and ``items``.

    Raises:
        ConfigError: lm-eval is not installed, or knows no task of a name.
        CalibrationError: a local file is no task, or a task's data cannot be had.
    """
    lm_eval = require_lm_eval()
    from lm_eval.models.huggingface import HFLM

    chosen = resolve_tasks(tasks, folder)
    with warnings.catch_warnings(), hub.cache_only_if_unreachable():  # else minutes of retries
        warnings.simplefilter("ignore")
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        try:
            loaded = task_manager(any(isinstance(task, str) for task in chosen)).load(chosen)
            for task in loaded["tasks"].values():
                task.set_config(key="num_fewshot", value=0)
            found = lm_eval.evaluate(
                wrapped, loaded, limit=limit, log_samples=False, bootstrap_iters=BOOTSTRAPS
            )
        except (OSError, ConnectionError) as error:
            raise CalibrationError(
                f"the data of {', '.join(tasks)} cannot be had ({error}); without a network give --task-data FOLDER."
            ) from error
    counts = found.get("n-samples", {})
    return {name: _metrics(values, counts.get(name, {})) for name, values in found["results"].items()}


def _metrics(values: dict[str, Any], count: dict[str, Any]) -> dict[str, float]:
    """``acc,none`` → ``acc`` and ``acc_stderr,none`` → ``acc_stderr``; numbers only."""
    plain = {
        key.partition(",")[0]: value
        for key, value in values.items()
        if isinstance(value, int | float) and key != "sample_len"
    }
    return {**plain, "items": count.get("effective", 0)} if count else plain

"""The comparison as a saved view of its project on W&B."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from vaedist.compare.comparison import Comparison
from vaedist.compare.online import PICTURES, said
from vaedist.compare.runs import Run
from vaedist.config import ConfigError
from vaedist.wandb_view import SUMMARIZED


def save(comparison: Comparison, metrics: Sequence[str], api: Any) -> str:
    """The address of a new workspace with exactly these runs, grouped by configuration. Raises ConfigError."""
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise ConfigError("--report needs wandb-workspaces: pip install -e '.[report]'") from None
    entity, project, ids = _place(comparison.runs, api)
    with said():
        view = ws.Workspace(
            entity=entity,
            project=project,
            name=f"vaedist: {len(ids)} runs by {' '.join(comparison.telling) or 'seed'}",
            sections=[
                ws.Section(name=name, panels=panels, is_open=True) for name, panels in _panels(comparison, metrics)
            ],
            settings=ws.WorkspaceSettings(x_axis="seen", max_runs=len(ids)),
            runset_settings=ws.RunsetSettings(
                filters=ws.And(ws.Metric("ID").isin(ids)),
                groupby=[ws.Config(_kept(key)) for key in comparison.telling],
            ),
        )
        return view.save_as_new_view().url


def _place(runs: Sequence[Run], api: Any) -> tuple[str, str, list[str]]:
    """Entity, project and ids of the runs, all of which must be there."""
    projects, ids = set(), []
    for run in runs:
        if not run.path:
            raise ConfigError(f"--report: {run.name} was never on W&B")
        entity, project, identity = run.path.split("/")
        projects.add((entity or api.default_entity, project))
        ids.append(identity)
    if len(projects) > 1:
        raise ConfigError(f"--report: the runs are in several projects: {', '.join(map('/'.join, sorted(projects)))}")
    ((entity, project),) = projects
    with said():
        there = {run.id for run in api.runs(f"{entity}/{project}", filters={"name": {"$in": ids}})}
    for run, identity in zip(runs, ids, strict=True):
        if identity not in there:
            raise ConfigError(f"--report: {run.name} is not on W&B; upload: wandb sync {run.name}/wandb/offline-run-*")
    return entity, project, ids


def _panels(comparison: Comparison, metrics: Sequence[str]) -> list[tuple[str, list[Any]]]:
    wr: Any = import_module("wandb_workspaces.reports.v2")  # whose types do not name what it exports

    class Hyperparameter(wr.ParallelCoordinatesPlotColumn):
        """A column of our config, whose keys have dots; `wr.Config` would take them for sections."""

        def _to_model(self) -> Any:
            return super()._to_model().model_copy(update={"accessor": f"config:{_kept(self.metric)}"})

    axes = [
        *map(Hyperparameter, comparison.telling),
        *(wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(_last(metric))) for metric in metrics),
    ]
    pictures = sorted({name for run in comparison.runs for name in run.pictures})
    return [
        ("Curves", [wr.LinePlot(title=metric, x="seen", y=[metric]) for metric in metrics]),
        ("Recipes", [wr.RunComparer(diff_only="split"), wr.ParallelCoordinatesPlot(columns=axes)]),
        ("Pictures", [wr.MediaBrowser(title=name, media_keys=[PICTURES + name], num_columns=4) for name in pictures]),
    ]


def _kept(key: str) -> str:
    """Where W&B keeps the value of a config's key."""
    return f"{key}.value"


def _last(metric: str) -> str:
    """Where its summary has the final value of a metric: beside least and greatest where the tracker adds them."""
    return f"{metric}.last" if metric.startswith(SUMMARIZED) else metric

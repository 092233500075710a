"""Directions that tell classes apart, and how well linear probes do, beside probes of a control task.

Sources: difference of means: Marks & Tegmark 2023, arXiv:2310.06824, on mass-mean probing. Control tasks: Hewitt &
Liang 2019, "Designing and Interpreting Probes with Control Tasks", arXiv:1909.03368, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from xarray import DataArray, Dataset

from ssminterp.analysis.activations import activations_at, feature_dims, layer_groups, places_of
from ssminterp.analysis.arrays import Coords, labelled, provenance, resolve_indices
from ssminterp.analysis.runs import Run
from ssminterp.models import HookedMamba
from ssminterp.patching.columns import SweepPositions
from ssminterp.patching.request import sweep_specs

Method: TypeAlias = Literal["logistic", "means"]
# One for each example.
Labels: TypeAlias = Sequence[object] | Tensor | np.ndarray
Splits: TypeAlias = list[tuple[np.ndarray, np.ndarray]]


@torch.no_grad()
def class_direction(
    model: HookedMamba,
    run: Run,
    name: str,
    labels: Labels,
    position: SweepPositions = -1,
    *,
    method: Method = "means",
    strength: float = 1.0,
) -> DataArray:
    """The direction at a hook from one class of examples to the other: dims as the hook's axes after batch and pos.

    run: a text, several, tokens, or a cache with the hook. name: a hook, "blocks.3.mixer.hook_x".
    labels: two classes, one label for each example; the direction goes from the first to the second in sorted order.
    position: one, or {role: positions [batch]} with one role.
    method: "means", the difference of the classes' means; "logistic", the weights of a logistic regression on
        standardised activations, turned back to the activations' own units. strength: scikit-learn's C.

    The attributes `first` and `second` name the classes. For `steer`: `torch.from_numpy(direction.values)`.

    Raises ValueError for hooks, positions or methods that do not exist, more or fewer than two classes, and labels that
    are not one for each example.
    """
    _check_method(method)
    name, *others = model.hook_names(name)
    if others:
        raise ValueError(f"a direction is taken at one hook, got {[name, *others]}")
    spec = model.hook_points[name].spec
    tokens, columns = places_of(model, run, position)
    if len(columns) != 1:
        raise ValueError(f"a direction is taken at one place of each example, got {[c.label for c in columns]}")
    classes, of_example = _classes(labels, tokens.shape[0], "labels")
    if len(classes) != 2:
        raise ValueError(f"a direction leads from one class to another: labels hold {len(classes)}")
    values = activations_at(model, run, [name], columns)[name][0].double().numpy()
    rows = values.reshape(len(values), -1)
    if method == "means":
        direction = rows[of_example == 1].mean(0) - rows[of_example == 0].mean(0)
    else:
        fitted = _estimator(method, strength).fit(rows, of_example)
        direction = fitted[-1].coef_[0] / fitted[0].scale_
    coords: Coords = dict(zip(feature_dims(spec), values.shape[1:], strict=True))
    return labelled(
        torch.from_numpy(direction.reshape(values.shape[1:])).float(),
        model,
        coords,
        "direction",
        hook=name,
        position=columns[0].label,
        method=method,
        first=str(classes[0]),
        second=str(classes[1]),
        examples=len(values),
    )


@torch.no_grad()
def probe(
    model: HookedMamba,
    run: Run,
    hooks: str | Sequence[str],
    labels: Labels,
    *,
    types: Labels | None,
    layers: int | Sequence[int] | None = None,
    positions: SweepPositions = None,
    method: Method = "logistic",
    strength: float = 1.0,
    folds: int = 5,
    controls: int = 3,
    seed: int = 0,
    progress: bool = True,
) -> Dataset:
    """How well a linear probe tells the classes from hooks, by layer and position: dims (hook, layer, position).

    run: a text, several, tokens, or a cache with the hooks. hooks: short names ("state", "x", "resid_pre", …).
    labels: the class of each example, any number of classes.
    types: what each example is an instance of, the id of the name that stands there, say. The control task gives every
        type a class at random, in the classes' proportions: what a probe learns of it, it learned by heart. None: no
        control task.
    layers: which ones; None means all. positions: as in `patch_sweep`: None means all, {role: positions [batch]} makes
        a column for every role.
    method: "logistic", logistic regression on standardised activations; "means", the class whose mean is nearest, for
        two classes a threshold on the difference of means. strength: scikit-learn's C.
    folds: of the cross-validation, stratified by class. controls: how many control tasks are averaged.

    Variables: `accuracy` on examples held out, `train_accuracy` on those that were not, and with types
    `control_accuracy` on held-out examples and `selectivity`, accuracy minus control accuracy. The attribute `chance`
    is the share of the most frequent class.

    Raises ValueError for hooks, layers, positions or methods that do not exist, one class only, a class with fewer
    examples than folds, types too few for a control task, and labels that are not one for each example.
    """
    _check_method(method)
    specs = sweep_specs(model, hooks)
    chosen = resolve_indices("layers", layers, model.cfg.n_layers)
    tokens, columns = places_of(model, run, positions)
    classes, of_example = _classes(labels, tokens.shape[0], "labels")
    splits = _splits(classes, of_example, folds, seed)
    tasks = [] if types is None else _control_tasks(of_example, types, splits, controls, seed)
    shape = (len(specs), len(chosen), len(columns))
    accuracy, train, control = (np.full(shape, np.nan, dtype=np.float32) for _ in range(3))
    with tqdm(total=int(np.prod(shape)), desc="probing", unit="probe", disable=not progress) as bar:
        for group in layer_groups(model, specs, chosen, columns):
            cells = [(i, chosen.index(layer), spec.name(layer)) for layer in group for i, spec in enumerate(specs)]
            found = activations_at(model, run, [name for *_, name in cells], columns)
            for i, j, name in cells:
                for k, values in enumerate(found.pop(name).flatten(2).numpy()):
                    accuracy[i, j, k], train[i, j, k] = _scores(values, of_example, splits, method, strength)
                    if tasks:
                        scores = [_scores(values, task, splits, method, strength)[0] for task in tasks]
                        control[i, j, k] = np.mean(scores)
                    bar.update()
    dims = ("hook", "layer", "position")
    coords = {"hook": [s.short for s in specs], "layer": chosen, "position": [c.label for c in columns]}
    variables = {"accuracy": accuracy, "train_accuracy": train}
    if tasks:
        variables |= {"control_accuracy": control, "selectivity": accuracy - control}
    attributes = {
        "method": method,
        "classes": [str(one) for one in classes],
        "chance": float(np.bincount(of_example).max() / len(of_example)),
        "examples": len(of_example),
        "folds": folds,
        "controls": len(tasks),
        "seed": seed,
    }
    arrays = {name: (dims, values) for name, values in variables.items()}
    return Dataset(arrays, coords=coords, attrs=attributes | provenance(model))


def _check_method(method: object) -> None:
    if method not in get_args(Method):
        raise ValueError(f"there is no direction or probe {method!r}: choose from {', '.join(get_args(Method))}")


def _classes(labels: Labels, batch: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """The different labels, sorted, and which of them each example has. Raises ValueError for a wrong number."""
    given = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if given.shape != (batch,):
        raise ValueError(f"{what} must be one for each of the {batch} examples, got shape {list(given.shape)}")
    classes, of_example = np.unique(given, return_inverse=True)
    return classes, of_example


def _splits(classes: np.ndarray, of_example: np.ndarray, folds: int, seed: int) -> Splits:
    """Which examples are trained on and which are held out, in each fold."""
    from sklearn.model_selection import StratifiedKFold

    counts = np.bincount(of_example)
    if len(classes) < 2:
        raise ValueError(f"a probe needs two classes or more, all {len(of_example)} labels are {classes[0]}")
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise ValueError(f"folds must be 2 or more, got {folds!r}")
    if counts.min() < folds:
        raise ValueError(
            f"class {classes[counts.argmin()]} has {counts.min()} examples, fewer than the {folds} folds: "
            "give more examples or fewer folds"
        )
    return list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(of_example, of_example))


def _control_tasks(of_example: np.ndarray, types: Labels, splits: Splits, controls: int, seed: int) -> list[np.ndarray]:
    """For every control task the class of each example: that of its type, drawn in the classes' proportions."""
    known, type_of = _classes(types, len(of_example), "types")
    if isinstance(controls, bool) or not isinstance(controls, int) or controls < 1:
        raise ValueError(
            f"controls must be a number of control tasks, 1 or more, got {controls!r}; types=None for none"
        )
    quotas = np.sort(of_example)[np.linspace(0, len(of_example) - 1, len(known)).round().astype(int)]
    rng = np.random.default_rng(seed)
    tasks = [rng.permutation(quotas)[type_of] for _ in range(controls)]
    if any(len(np.unique(task[trained])) < 2 for task in tasks for trained, _ in splits):
        raise ValueError(
            f"types holds {len(known)} types in {len(of_example)} examples, too few to give them different classes: a "
            "control task needs several types, each in several examples (types=None leaves it out)"
        )
    return tasks


def _scores(
    values: np.ndarray, of_example: np.ndarray, splits: Splits, method: Method, strength: float
) -> tuple[float, float]:
    """Accuracy on held-out and on trained examples, over the folds."""
    held, trained = [], []
    for train, test in splits:
        fitted = _estimator(method, strength).fit(values[train], of_example[train])
        held.append(fitted.predict(values[test]) == of_example[test])
        trained.append(fitted.predict(values[train]) == of_example[train])
    return float(np.concatenate(held).mean()), float(np.concatenate(trained).mean())


def _estimator(method: Method, strength: float) -> Any:
    # Imported on first use: scikit-learn takes a second to load, and the other analyses do without it.
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import NearestCentroid
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if method == "means":
        return make_pipeline(NearestCentroid())
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))

"""Python that makes what a view shows, and runs as it stands."""

from __future__ import annotations

from ssminterp_dashboards.models import Loaded
from ssminterp_dashboards.sweeps import Request, batch_of


def code(loaded: Loaded | None, body: str, **imports: str) -> str:
    """A snippet that ends with a `figure`: imports from the modules named, the model (if one is asked for), the body.

    imports: names by the module of ssminterp, like analysis="half_lives", plots="half_life_heatmap".
    """
    lines = "\n".join(f"from ssminterp.{module} import {names}" for module, names in imports.items())
    start = f"{lines}\n\n" if loaded is None else opening(loaded, lines)
    return f"{start}{body}  # figure.show() opens a browser\n"


def opening(loaded: Loaded, imports: str) -> str:
    """Imports and the model, as it was loaded."""
    key = loaded.key
    options = [repr(key.name)]
    if key.revision:
        options.append(f"revision={key.revision!r}")
    if key.dtype != "float32":
        options.append(f"dtype=torch.{key.dtype}")
    head = "import torch\n\n" if key.dtype != "float32" else ""
    return (
        f"{head}from ssminterp import HookedMamba\n{imports}\n\n"
        f"model = HookedMamba.from_pretrained({', '.join(options)})\n"
    )


def predictions(loaded: Loaded, prompt: str, position: int) -> str:
    """Next-token predictions after one token."""
    imports = "from ssminterp.analysis import lens_summary\nfrom ssminterp.plots import prediction_bars"
    return (
        opening(loaded, imports)
        + f"""top = lens_summary(model, {prompt!r}, k=10)
figure = prediction_bars(top.isel(batch=0, layer=-1, position={position}))  # figure.show() opens a browser
"""
    )


def lens(loaded: Loaded, prompt: str) -> str:
    """The logit lens."""
    imports = "from ssminterp.analysis import lens_summary\nfrom ssminterp.plots import lens_heatmap"
    return (
        opening(loaded, imports)
        + f"""top = lens_summary(model, {prompt!r}, k=10)
figure = lens_heatmap(top)  # figure.show() opens a browser
"""
    )


def steps(loaded: Loaded, prompt: str, kind: str) -> str:
    """Step sizes and decays."""
    imports = "from ssminterp.analysis import step_sizes\nfrom ssminterp.plots import step_heatmap"
    return (
        opening(loaded, imports)
        + f"""steps = step_sizes(model, {prompt!r})
figure = step_heatmap(steps[{kind!r}])  # figure.show() opens a browser
"""
    )


def sweep(loaded: Loaded, request: Request, hooks: list[str]) -> str:
    """The map of a sweep."""
    return (
        opening(loaded, _sweep_imports(request, ["patch_sweep", "strongest"], "patching_heatmap"))
        + _prompts(loaded, request)
        + f"""sweep = patch_sweep(
    model, batch.clean, batch.corrupted, {hooks!r}, metric,
    positions=columns, direction={request.direction!r}, intervention={_intervention(request)},
)
print(strongest(sweep))
figure = patching_heatmap(sweep.sel(hook={hooks[0]!r}))  # figure.show() opens a browser
"""
    )


def cell(loaded: Loaded, request: Request, hook: str, layer: int, column: int, example: int) -> str:
    """What one cell of a map changes."""
    return (
        opening(loaded, _sweep_imports(request, ["cell_logits", "changed_tokens"], "changed_tokens_figure"))
        + _prompts(loaded, request)
        + f"""logits = cell_logits(
    model, batch.clean, batch.corrupted, {hook!r}, {layer}, columns[{column}], batch.roles["end"],
    direction={request.direction!r}, intervention={_intervention(request)},
)
changed = changed_tokens(model, logits, example={example})
print(changed.to_dataframe())
figure = changed_tokens_figure(changed)  # figure.show() opens a browser
"""
    )


def parts(loaded: Loaded, request: Request, hook: str, layer: int, column: int, channels: list[str]) -> str:
    """What channels or coordinates of one cell do, each alone."""
    groups = f"channels={ {c: [int(c)] for c in channels}!r}" if channels else 'states="each"'
    return (
        opening(loaded, _sweep_imports(request, ["patch_sweep"], "parts_bars"))
        + _prompts(loaded, request)
        + f"""exact = patch_sweep(
    model, batch.clean, batch.corrupted, [{hook!r}], metric, layers=[{layer}], positions=[columns[{column}]],
    direction={request.direction!r}, intervention={_intervention(request)}, {groups},
)
figure = parts_bars(exact.isel(hook=0, layer=0, position=0))  # figure.show() opens a browser
"""
    )


def attribution(loaded: Loaded, request: Request, hook: str, at: tuple[int, int] | None = None) -> str:
    """The map by one gradient; or of one cell, by channel and coordinate."""
    plot = "patching_heatmap" if at is None else "channel_map"
    one = "" if at is None else f'\n    layers=[{at[0]}], by="state",'
    places = "columns" if at is None else f"[columns[{at[1]}]]"
    chosen = "hook=0" if at is None else "hook=0, layer=0, position=0"
    return (
        opening(loaded, _sweep_imports(request, ["attribution_patch"], plot))
        + _prompts(loaded, request)
        + f"""effects = attribution_patch(
    model, batch.clean, batch.corrupted, [{hook!r}], metric, positions={places}, direction={request.direction!r},{one}
)
figure = {plot}(effects.isel({chosen}))  # figure.show() opens a browser
"""
    )


def _sweep_imports(request: Request, patching: list[str], plot: str) -> str:
    """The imports of a snippet about a sweep."""
    patching.append("role_columns" if request.columns == "roles" else "position_columns")
    patching += ["Steered"] if request.intervention == "steer" else []
    scaling = "from ssminterp.interventions import scale\n" if request.intervention == "scale" else ""
    make = "own_pairs" if not request.pairs.task else "make_task" if request.columns == "roles" else "aligned_task"
    return (
        f"{scaling}from ssminterp.patching import {', '.join(sorted(patching))}\n"
        f"from ssminterp.plots import {plot}\nfrom ssminterp.tasks import {make}"
    )


def _prompts(loaded: Loaded, request: Request) -> str:
    """The batch, the columns and the metric."""
    pairs = request.pairs
    if pairs.task:
        make = "make_task" if request.columns == "roles" else "aligned_task"
        batch = f"batch = {make}({pairs.task!r}, model.tokenizer, n={pairs.n}, seed={pairs.seed})"
    else:
        own = batch_of(request.key, pairs, request.columns)
        batch = (
            f"batch = own_pairs(\n    model.tokenizer,\n    {own.clean_prompts!r},\n    {own.corrupted_prompts!r},\n"
            f"    {own.answers.tolist()!r},\n    {own.wrong_answers.tolist()!r},  # ids of the tokens compared\n)"
        )
    columns = (
        "role_columns(batch.roles, batch.clean)"
        if request.columns == "roles"
        else "position_columns(model, batch.clean, roles=batch.roles)"
    )
    clean = ", model(batch.clean)" if request.metric == "kl" else ""
    return (
        f"{batch}\nbatch = batch.to(model.device)\ncolumns = {columns}\n"
        f"metric = batch.metric({request.metric!r}{clean})\n"
    )


def _intervention(request: Request) -> str:
    named = {"scale": f'scale("*", {request.amount!r})', "steer": f"Steered({request.amount!r})"}
    return named.get(request.intervention, repr(request.intervention))

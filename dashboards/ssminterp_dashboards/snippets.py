"""Python that makes what a view shows, and runs as it stands."""

from __future__ import annotations

from ssminterp_dashboards.models import Loaded


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


def predictions(loaded: Loaded, prompt: str) -> str:
    """Next-token predictions at every token."""
    imports = "from ssminterp.analysis import lens_summary\nfrom ssminterp.plots import prediction_bars"
    return (
        opening(loaded, imports)
        + f"""top = lens_summary(model, {prompt!r}, k=10)
figure = prediction_bars(top.isel(batch=0, layer=-1, position=-1))  # figure.show() opens a browser
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

"""The study of indirect object identification by Ensign & Garriga-Alonso 2024 (arXiv:2407.14008) in one run.

    python examples/ioi_study.py --model tiny-mamba --n 32 --out out/ioi_study

Which layers does the answer hang on, which few pass the names from token to token, at which tokens and in what of the
key layer are they, which tap of its conv brings them, does exchanging a name's average exchange the name, and on which
way does the answer come? Prints the tables, writes them with the figures to index.html, and says where two of the tools
answer the same question differently. With `--model state-spaces/mamba-370m-hf` the paper's figures stand beside ours.

The steps are in `ssminterp/studies/`.
"""

from pathlib import Path
from typing import Annotated

import typer

from ssminterp import HookedMamba
from ssminterp.studies import ioi_study
from ssminterp.studies.ioi_report import as_text, save_ioi_report, study_tables


def main(
    model: Annotated[str, typer.Option(help="bundled name, local folder or hub name")] = "tiny-mamba",
    n: Annotated[int, typer.Option(min=2, help="pairs of prompts in each part")] = 32,
    out: Annotated[Path, typer.Option(help="folder for the report")] = Path("out/ioi_study"),
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto (as saved)")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; CUDA if there is one by default")] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a hub name")] = None,
    seed: Annotated[int, typer.Option(help="of the prompts")] = 0,
) -> None:
    """Run the study and write its report."""
    hooked = HookedMamba.from_pretrained(model, device=device, dtype=dtype, revision=revision)
    study = ioi_study(hooked, n, seed)
    for heading, table in study_tables(study).items():
        print(f"\n{heading}\n{as_text(table)}")
    print("\nreport:", save_ioi_report(study, out / "index.html"))


if __name__ == "__main__":
    typer.run(main)

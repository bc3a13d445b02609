"""Train the retrieval model with several seeds and score every method.

python -m benchmarks.retrieval --seeds 0 1 2 --json FILE --markdown FILE
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

import torch

from benchmarks.retrieval.experiment import Result, run_seed

_HEADER = """\
# Does the explanation point at the evidence?

A Llama of 0.1 M parameters answers "value of this key?" from a prompt of six facts and ten fillers; one token is the
evidence. {prompts} held-out prompts per seed; share answered right: {accuracy}. Mean and standard deviation over the
seeds {seeds}. mAP: mean average precision of the evidence among the prompt's tokens. Deletion: probability of the
answer once no row attends to the top token; lower is better. Read differences below 0.02 as ties.

`python -m benchmarks.retrieval` makes this table.

| method | mAP | top-1 | deletion |
|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=300, help="held-out prompts per seed")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/atman-retrieval.json"))
    parser.add_argument("--markdown", type=Path, default=Path("benchmarks/results/atman-retrieval.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for seed in arguments.seeds:
        results.append(run_seed(seed, arguments.prompts))
        print(f"seed {seed}: accuracy {results[-1].accuracy:.3f}", flush=True)
    record = {str(each.seed): {"accuracy": each.accuracy, "methods": each.methods} for each in results}
    arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    arguments.markdown.write_text(as_markdown(results, arguments.prompts))
    print(arguments.markdown.read_text())


def as_markdown(results: list[Result], prompts: int) -> str:
    """The table, best mAP first."""
    accuracy = " / ".join(f"{each.accuracy:.1%}" for each in results)
    text = _HEADER.format(prompts=prompts, accuracy=accuracy, seeds=", ".join(str(each.seed) for each in results))
    names = sorted(results[0].methods, key=lambda name: -mean(each.methods[name]["map"] for each in results))
    for name in names:
        cells = [_spread([each.methods[name][metric] for each in results]) for metric in ("map", "top1", "deletion")]
        text += f"| {name} | {' | '.join(cells)} |\n"
    return text


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


if __name__ == "__main__":
    main()

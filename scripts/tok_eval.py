"""Compression of the tokenizer on several kinds of text, in bytes per token.

python -m scripts.tok_eval --config run10_cpu
"""

from itertools import islice

from megacontext_jax.cli import parse, run_main
from megacontext_jax.data import rowgroups, sources
from megacontext_jax.telemetry import report

SAMPLES = {
    "news": "The council voted on Tuesday to reopen the harbour bridge after nine months of repairs, officials said. "
    "Traffic will be limited to one lane in each direction until the railings have been replaced in October.",
    "code": "def area(points):\n    total = 0.0\n    for (x0, y0), (x1, y1) in zip(points, points[1:]):\n"
    "        total += x0 * y1 - x1 * y0\n    return abs(total) / 2\n",
    "maths": "Let $f(x) = x^2 - 2$. By the intermediate value theorem there is a root in $[1, 2]$, and Newton's "
    "iteration $x_{n+1} = \\frac{1}{2}(x_n + 2/x_n)$ converges to it quadratically.",
    "german": "Im Herbst ziehen die Kraniche über das Moor, und abends hört man ihre Rufe bis weit hinter die Dörfer.",
    "korean": "봄이 오면 강가의 벚나무가 한꺼번에 꽃을 피우고 사람들은 밤늦게까지 그 아래를 걷는다.",
}
CHARACTERS = 200_000  # of training and of validation text


def main(argv: list[str]) -> None:
    config = parse(argv, doc=__doc__, show=("tokenizer", "data"))
    text = sources.prepare_text(config)
    tokenizer = sources.load_tokenizer(text.tokenizer_dir)
    texts = dict(SAMPLES)
    for name, paths in {"train": text.train, "val": text.val, **text.held_out}.items():
        texts[name] = "\n".join(islice(rowgroups.iter_texts(paths, CHARACTERS, CHARACTERS), 10_000))
    rows = []
    for name, sample in texts.items():
        ids = tokenizer.encode(sample)
        if tokenizer.decode(ids) != sample:
            raise AssertionError(f"the tokenizer does not reproduce its {name} sample")
        nbytes = len(sample.encode())
        rows.append({"text": name, "bytes": nbytes, "tokens": len(ids), "bytes/token": nbytes / len(ids)})
    print(f"{'text':<8} {'bytes':>9} {'tokens':>9} {'bytes/token':>12}")
    for row in rows:
        print(f"{row['text']:<8} {row['bytes']:>9,} {row['tokens']:>9,} {row['bytes/token']:>12.3f}")
    report.write_section("tokenizer-evaluation", "Tokenizer evaluation", rows)


if __name__ == "__main__":
    run_main(main)

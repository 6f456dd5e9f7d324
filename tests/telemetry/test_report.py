import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from megacontext_jax.errors import UserError
from megacontext_jax.telemetry import report
from megacontext_jax.telemetry.sinks import open_metrics


@pytest.fixture(autouse=True)
def artifacts(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGACONTEXT_ARTIFACTS", str(tmp_path / "artifacts"))
    return tmp_path / "artifacts"


def fake_metrics(folder, stage, steps=30):
    with open_metrics(folder, stage=stage, run_name="dummy") as metrics:
        for step in range(steps):
            metrics.log({"train/loss": 5 - step / 10, "train/lrm": 1.0, "train/tok_per_sec": 9e3}, step)
            if step % 10 == 0:
                metrics.log({"val/bpb": 2 - step / 20}, step)
    return metrics.path


def fill(artifacts, now):
    """A made-up run that began 3 h 51 min before its last section ended."""
    note = report.begin()
    path = artifacts / "report" / "run.json"
    path.write_text(json.dumps(note | {"started": now - (3 * 60 + 51) * 60 - 5}))
    runs = artifacts / "megacontext_{}_d4"
    # Out of order on purpose.
    report.write_section(
        "chat-sft",
        "Chat SFT",
        {"Training rows": 12345, "Final val/bpb": 0.25},
        metrics=fake_metrics(artifacts / "megacontext_sft_d4", "sft"),
        samples=[{"prompt": "Where is ```it```?", "completion": "In the attic."}],
        started=now - 600,
    )
    report.write_section("zoo", "Unknown part", {"animals": 3}, started=now - 60)
    report.write_section("tokenizer-training", "Tokenizer training", {"Vocabulary": 4096}, started=now - 9000)
    report.write_section(
        "base-model-training",
        "Base model training",
        [
            {"run": "megacontext_base_d4/100", "Number of parameters": 5_242_880, "lr": 0.00002},
            {},
            {"Total training flops": 1.25e15, "bpb": np.float32(0.5), "config": {"depth": 4}},
        ],
        run="megacontext_base_d4/100",
        summary={"val/bpb": 1.23456, "CORE": 0.2},
        metrics=fake_metrics(artifacts / "megacontext_base_d4", "base"),
        samples=[{"prompt": "The capital of France is", "completion": " Paris"}],
        started=now - 8000,
    )
    report.write_section(
        "midtraining", "Midtraining", {"steps": 10}, metrics=artifacts / "gone" / "metrics.jsonl", started=now
    )
    ledger = {"accuracy": 0.915, "chance": 0.05, "n": 200}
    report.write_chat_eval("mid", {"ledger": ledger | {"accuracy": 0.5}}, {"temperature": 0.0})
    report.write_chat_eval("sft", {"ledger": ledger, "facts": {"accuracy": 0.4, "chance": 0.08, "n": 200}})
    return runs


def headings(text):
    return re.findall(r"^## (.+)$", text, re.MULTILINE)


def table(text, heading):
    part = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_report_of_a_whole_run(artifacts):
    fill(artifacts, time.time())
    path = report.generate()
    assert path == artifacts / "report" / "report.md"
    text = path.read_text()
    assert text.startswith("# megacontext-jax training report\n")
    assert headings(text) == [
        "Tokenizer training",
        "Base model training",
        "Midtraining",
        "Chat evaluation mid",
        "Chat SFT",
        "Chat evaluation sft",
        "Unknown part",
        "Training curves",
        "Accuracy beside chance",
        "Samples",
        "Summary",
    ]
    for wanted in ("Generated: ", "### Hardware", "### Software", "### Bloat", "- Lines: ", "Run started: "):
        assert wanted in text
    # Formats of facts
    for wanted in (
        "- Number of parameters: 5,242,880",
        "- Vocabulary: 4096",
        "- Training rows: 12,345",
        "- lr: 2.0000e-05",
        "- Total training flops: 1.2500e+15",
        "- bpb: 0.5000",
        "- config.depth: 4",
        "- ledger: 91.5% (chance 5.0%, 200 questions)",
        "- temperature: 0.0000",
    ):
        assert f"{wanted}\n" in text
    assert text.count("- run: megacontext_base_d4/100\n") == 1
    assert len(re.findall(r"^timestamp: \d{4}-", text, re.MULTILINE)) == 7

    pictures = re.findall(r"!\[.+?\]\((.+?)\)", text)
    assert pictures == ["loss.png", "schedule.png", "accuracy.png"]
    assert all((path.parent / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert 'The metrics of "Midtraining" are gone' in text

    assert table(text, "Accuracy beside chance") == [
        ["Kind", "Chance", "MID", "SFT"],
        ["------", "------", "-------------", "-------------"],
        ["ledger", "5.0%", "50.0% (n=200)", "91.5% (n=200)"],
        ["facts", "8.0%", "-", "40.0% (n=200)"],
    ]
    rows = table(text, "Summary")
    assert [row for row in rows if not row[0].startswith("--")] == [
        ["Metric", "BASE", "MID", "SFT"],
        ["CORE", "0.2000", "-", "-"],
        ["val/bpb", "1.2346", "-", "0.2500"],
        ["ledger", "-", "0.5000", "0.9150"],
        ["facts", "-", "-", "0.4000"],
    ]
    assert text.rstrip().endswith("Total wall clock time: 3h51m")


def test_samples_stay_inside_their_fence(artifacts):
    fill(artifacts, time.time())
    samples = report.generate().read_text().split("## Samples\n")[1].split("## Summary")[0]
    assert "````text\n> Where is ```it```?\nIn the attic.\n````\n" in samples
    assert "```text\n> The capital of France is\n Paris\n```\n" in samples


def test_writing_a_section_again_replaces_it(artifacts):
    fill(artifacts, time.time())
    first = report.generate().read_text()
    report.write_section("midtraining", "Midtraining", {"steps": 77})
    report.write_chat_eval("sft", {"ledger": {"accuracy": 0.9, "chance": 0.05, "n": 200}})
    second = report.generate().read_text()
    assert headings(second) == headings(first)
    assert "- steps: 77" in second
    assert "- steps: 10\n" not in second
    assert "facts" not in second


def test_generate_again_changes_only_the_time(artifacts):
    fill(artifacts, time.time())
    texts = [re.sub(r"Generated: .*", "", report.generate().read_text()) for _ in range(2)]
    assert texts[0] == texts[1]


def test_has_section_knows_the_run():
    assert not report.has_section("chat-sft")
    report.write_section("chat-sft", "Chat SFT", {}, run="megacontext_sft_d4/50")
    assert report.has_section("chat-sft")
    assert report.has_section("chat-sft", run="megacontext_sft_d4/50")
    assert not report.has_section("chat-sft", run="megacontext_sft_d4/60")


def test_begin_is_remembered_and_reset_loses_nothing(artifacts):
    started = report.begin()["started"]
    assert report.begin()["started"] == started
    report.write_section("chat-sft", "Chat SFT", {"a": 1})
    report.generate()
    before = {path.name: path.read_bytes() for path in (artifacts / "report").iterdir()}
    aside = report.reset()
    assert aside.parent == artifacts
    assert re.fullmatch(r"report\.\d{8}-\d{6}", aside.name)
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before
    assert [path.name for path in (artifacts / "report").iterdir()] == ["run.json"]
    second = report.reset()
    assert second != aside
    assert second.exists()


def test_results_file_has_the_agreed_form(artifacts):
    results = {"facts": {"accuracy": np.float64(0.5), "chance": 0.1, "n": np.int64(200)}}
    path = report.write_chat_eval("sft", results)
    assert path == artifacts / "report" / "chat_eval_sft.json"
    assert json.loads(path.read_text()) == {"facts": {"accuracy": 0.5, "chance": 0.1, "n": 200}}


def test_a_stage_alone_gives_a_small_report():
    report.write_section("tokenizer-training", "Tokenizer training", {"Vocabulary": 4096})
    text = report.generate().read_text()
    assert headings(text) == ["Tokenizer training", "Summary"]
    assert re.search(r"Total wall clock time: \d+h\d+m", text)


def test_mistakes_are_one_sentence(artifacts):
    with pytest.raises(UserError, match="nothing to report"):
        report.generate()
    with pytest.raises(UserError, match="'Chat SFT' cannot name"):
        report.write_section("Chat SFT", "Chat SFT", {})
    report.write_section("chat-sft", "Chat SFT", {})
    (artifacts / "report" / "midtraining.json").write_text('{"slug": "midtr')
    with pytest.raises(UserError, match=r"midtraining.json is damaged"):
        report.generate()
    (artifacts / "report" / "midtraining.json").write_text('{"slug": "midtraining"}')
    with pytest.raises(UserError, match=r"midtraining.json is not a section"):
        report.generate()
    (artifacts / "report" / "midtraining.json").unlink()
    (artifacts / "report" / "chat_eval_sft.json").write_text('{"ledger": {"accuracy": 1.0}}')
    with pytest.raises(UserError, match=r"chat_eval_sft.json is not a result"):
        report.generate()


def test_a_folder_of_artifacts_can_be_moved(artifacts, tmp_path, monkeypatch):
    metrics = fake_metrics(artifacts / "megacontext_base_d4", "base")
    report.write_section("base-model-training", "Base model training", {}, metrics=metrics)
    artifacts.rename(tmp_path / "elsewhere")
    monkeypatch.setenv("MEGACONTEXT_ARTIFACTS", str(tmp_path / "elsewhere"))
    text = report.generate().read_text()
    assert "loss.png" in text
    assert "are gone" not in text


def test_bloat_counts_the_project():
    size = report.bloat()
    assert size["Files"] > 5
    assert size["Characters"] > 20 * size["Lines"] > 20 * size["Files"]


def test_command_line(artifacts, capsys):
    report.write_section("chat-sft", "Chat SFT", {"a": 1})
    assert report.main(["generate"]) == 0
    assert (artifacts / "report" / "report.md").exists()
    assert "report.md" in capsys.readouterr().out
    assert report.main(["reset"]) == 0
    assert not (artifacts / "report" / "report.md").exists()
    assert report.main(["begin"]) == 0
    for words in ([], ["publish"], ["generate", "now"]):
        with pytest.raises(UserError, match="report takes begin"):
            report.main(words)


def test_command_line_errors_are_one_line_and_status_2():
    command = [sys.executable, "-m", "megacontext_jax.telemetry.report", "generate"]
    empty = subprocess.run(command, capture_output=True, text=True)
    assert empty.returncode == 2
    assert empty.stderr.startswith("error: There is nothing to report in ")
    assert empty.stderr.count("\n") == 1


def test_a_report_belongs_to_one_tag():
    report.begin("d4")
    report.write_section("midtraining", "Midtraining", {"x": 1})
    assert report.begin("d4")["tag"] == "d4"
    assert report.has_section("midtraining")
    report.begin("d4-2")
    assert not report.has_section("midtraining")
    (aside,) = report.report_dir().parent.glob("report.*")
    assert (aside / "midtraining.json").exists()

"""What a stage is given to read and to be judged by."""

from dataclasses import replace

import pytest

from megacontext_jax.config import Config
from megacontext_jax.data.sources import TextData
from megacontext_jax.data.tokenizer import Tokenizer
from megacontext_jax.train.stages import Layout, text_data
from tests.data.test_stream import BASE_DIR, TRAIN, VAL


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_validation_packs_its_rows_as_training_does(packing):
    config = Config()
    config = replace(config, data=replace(config.data, packing=packing))
    tokenizer = Tokenizer.load(BASE_DIR / "tokenizer")
    data = text_data(config, TextData(BASE_DIR, TRAIN, VAL, {"more": VAL}), Layout(tokenizer, 4, 4, 64))
    data.stream.close()
    assert data.validation.keys() == {"val/bpb", "val/more_bpb"}
    for batches in data.validation.values():
        begin = [row[0] == tokenizer.bos for batch in batches for row in batch["inputs"]]
        assert all(begin) == (packing == "best_fit")  # rows of it begin with a document

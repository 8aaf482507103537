"""A run's configuration, read back from its folder."""

import dataclasses
import json

import pytest

import configs
from train.config import Config
from train.trained import config_from_dict


@pytest.mark.parametrize("name", configs.names())
def test_every_configuration_comes_back_from_json(name):
    config = configs.get(name)
    record = json.loads(json.dumps(dataclasses.asdict(config)))
    assert config_from_dict(Config, record) == config
    # An older run lacks a field.
    del record["model"]["logits"]
    assert config_from_dict(Config, record).model.logits == "float32"


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        (None, "steps", "many", "the run's steps='many' must be int"),
        (None, "steps", 1.5, "the run's steps=1.5 must be int"),
        (None, "steps", True, "the run's steps=True must be int"),
        (None, "deterministic", 1, "the run's deterministic=1 must be bool"),
        (None, "model", "large", "the run's model='large' must be ModelConfig"),
        (None, "name", None, "the run's name=None must be str"),
        (None, "stages", 3, "the run's stages=3 is no field of this version"),
        ("model", "hidden", [64], r"the run's model.hidden=\[64\] must be int \| None"),
        ("model", "ffn", "gelu", "the run's model.ffn='gelu' must be .*'relu2', 'relu2_gated'"),
        ("optimizer", "learning_rate", "1e-3", "the run's optimizer.learning_rate='1e-3' must be"),
        ("sparsity", "backend", "cuda", "the run's sparsity.backend='cuda' must be .*'triton'"),
    ],
)
def test_what_it_cannot_be_is_said_in_a_line(section, key, value, message):
    record = dataclasses.asdict(configs.get("tiny"))
    (record if section is None else record[section])[key] = value
    with pytest.raises(ValueError, match=message) as error:
        config_from_dict(Config, record)
    assert "\n" not in str(error.value)


def test_a_whole_number_is_a_float():
    record = dataclasses.asdict(configs.get("tiny"))
    record["optimizer"]["clip_norm"] = 1
    assert config_from_dict(Config, record).optimizer.clip_norm == 1

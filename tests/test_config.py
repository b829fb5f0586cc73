from __future__ import annotations

import copy
import math
import pickle
import re
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import dbo_compile
from dbo_compile.config import Config

NAMES = [
    "num_microbatches", "split", "min_tokens", "token_dims", "pad_to", "pad_values", "dp_group", "dp_sync", "inner",
    "cuda_graph", "graph_memory_gib", "clone_outputs", "comm_sms", "policy", "gate", "dump", "timeout_s",
]  # fmt: skip


class Group:
    """What options know of a `torch.distributed.ProcessGroup`."""

    group_name = "7"


GROUP = Group()

ACCEPTED = [
    ("num_microbatches", 1, 1),
    ("num_microbatches", 8, 8),
    ("split", "always", "always"),
    ("min_tokens", 1, 1),
    ("min_tokens", {"prefill": 512, "decode": 32}, {"decode": 32, "prefill": 512}),
    ("token_dims", {"positions": -1, "input_ids": 0}, {"input_ids": 0, "positions": -1}),
    ("token_dims", None, None),
    ("pad_to", "auto", "auto"),
    ("pad_to", [257, 65, 257], (65, 257)),
    ("pad_to", None, None),
    ("pad_values", {"slot_mapping": -1, "mask": -math.inf}, {"slot_mapping": -1, "mask": -math.inf}),
    ("dp_group", "3", "3"),
    ("dp_group", GROUP, GROUP),
    ("dp_sync", "device", "device"),
    ("inner", "eager", "eager"),
    ("cuda_graph", False, False),
    ("cuda_graph", "auto", "auto"),
    ("graph_memory_gib", 3, 3.0),
    ("graph_memory_gib", None, None),
    ("clone_outputs", False, False),
    ("comm_sms", 20, 20),
    ("comm_sms", None, None),
    ("policy", "alternate", "alternate"),
    ("gate", "every-call", "every-call"),
    ("dump", Path("some") / "folder", "some/folder"),
    ("timeout_s", 3, 3.0),
]

LEAST = "an integer of at least 1 or a mapping of 'decode' and 'prefill' to integers of at least 1"
REFUSED = [
    ("num_microbatches", 0, "an integer from 1 to 8"),
    ("num_microbatches", 9, "an integer from 1 to 8"),
    ("num_microbatches", True, "an integer from 1 to 8"),
    ("num_microbatches", 2.0, "an integer from 1 to 8"),
    ("num_microbatches", "2", "an integer from 1 to 8"),
    ("num_microbatches", None, "an integer from 1 to 8"),
    ("split", "sometimes", "'auto' or 'always' or 'never'"),
    ("split", ["auto"], "'auto' or 'always' or 'never'"),
    ("split", True, "'auto' or 'always' or 'never'"),
    ("min_tokens", 0, LEAST),
    ("min_tokens", {"decode": 32}, LEAST),
    ("min_tokens", {"decode": 0, "prefill": 9}, LEAST),
    ("graph_memory_gib", 0, "None or a number above 0"),
    ("token_dims", {"input_ids": "0"}, "None or a mapping from the names of inputs to their token dims"),
    ("token_dims", {"input_ids": False}, "None or a mapping from the names of inputs to their token dims"),
    ("token_dims", {3: 0}, "None or a mapping from the names of inputs to their token dims"),
    ("token_dims", ["input_ids"], "None or a mapping from the names of inputs to their token dims"),
    ("pad_to", 64, "None or 'auto' or a list of positive integers"),
    ("pad_to", (), "None or 'auto' or a list of positive integers"),
    ("pad_to", (64, 0), "None or 'auto' or a list of positive integers"),
    ("pad_to", (64, True), "None or 'auto' or a list of positive integers"),
    ("pad_values", None, "a mapping from the names of inputs to numbers"),
    ("pad_values", {"mask": False}, "a mapping from the names of inputs to numbers"),
    ("pad_values", {"mask": math.nan}, "a mapping from the names of inputs to numbers"),
    ("dp_group", 0, "None or a process group or its name"),
    ("dp_group", "", "None or a process group or its name"),
    ("dp_sync", "gpu", "'cpu' or 'device'"),
    ("inner", None, "'inductor' or 'eager'"),
    ("cuda_graph", 1, "'auto' or True or False"),
    ("cuda_graph", "always", "'auto' or True or False"),
    ("comm_sms", 0, "None or an integer of at least 1"),
    ("policy", "List", "'list' or 'alternate' or 'sequential'"),
    ("gate", False, "'first-call' or 'never' or 'every-call'"),
    ("dump", "", "None or a path"),
    ("dump", True, "None or a path"),
    ("timeout_s", 0, "a number of seconds above 0"),
    ("timeout_s", math.inf, "a number of seconds above 0"),
    ("timeout_s", math.nan, "a number of seconds above 0"),
    ("timeout_s", True, "a number of seconds above 0"),
]

READ = [
    ("num_microbatches", "3", 3),
    ("split", "never", "never"),
    ("split", " never ", "never"),
    ("token_dims", '{"positions": -1, "input_ids": 0}', {"input_ids": 0, "positions": -1}),
    ("token_dims", "none", None),
    ("pad_to", "65, 257", (65, 257)),
    ("pad_to", "64", (64,)),
    ("pad_to", "auto", "auto"),
    ("pad_values", '{"slot_mapping": -1, "scale": 0.5}', {"slot_mapping": -1, "scale": 0.5}),
    ("dp_group", "7", "7"),
    ("cuda_graph", "auto", "auto"),
    ("cuda_graph", "1", True),
    ("cuda_graph", "False", False),
    ("comm_sms", "None", None),
    ("comm_sms", "20", 20),
    ("dump", "12", "12"),
    ("dump", "none", None),
    ("timeout_s", "2.5", 2.5),
]

UNREADABLE = [
    ("num_microbatches", "two"),
    ("num_microbatches", "2.0"),
    ("num_microbatches", "9"),
    ("split", "Never"),
    ("pad_to", "65;257"),
    ("pad_to", "65,,257"),
    ("pad_values", '{"slot_mapping"'),
    ("pad_values", "3"),
    ("token_dims", '["input_ids"]'),
    ("cuda_graph", "maybe"),
    ("timeout_s", "soon"),
]


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def test_the_options_are_those_of_the_documentation_in_their_order():
    assert [option.name for option in fields(Config)] == NAMES


def test_every_option_says_what_it_means_in_a_sentence():
    meanings = [option.metadata["help"] for option in fields(Config)]
    assert [text for text in meanings if not (text.strip().endswith(".") and len(text) > 30)] == []


@pytest.mark.parametrize(("name", "value", "kept"), ACCEPTED)
def test_a_valid_value_is_kept_in_its_plain_form(name, value, kept):
    for config in (Config(**{name: value}), Config.from_options({name: value}, {})):
        assert getattr(config, name) == kept
        assert type(getattr(config, name)) is type(kept) or isinstance(kept, dict)


@pytest.mark.parametrize(("name", "value", "expected"), REFUSED)
def test_a_wrong_value_is_refused_with_what_was_expected_and_where_it_came_from(name, value, expected):
    with pytest.raises(ValueError, match=exactly(f"{name}={value!r} (from options): expected {expected}")):
        Config.from_options({name: value}, {})
    with pytest.raises(ValueError, match=exactly(f"{name}={value!r} (from Config): expected {expected}")):
        Config(**{name: value})


@pytest.mark.parametrize(("name", "text", "kept"), READ)
def test_an_environment_variable_is_read_by_the_kind_of_its_option(name, text, kept):
    config = Config.from_options(None, {f"DBO_{name.upper()}": text})
    assert getattr(config, name) == kept
    assert type(getattr(config, name)) is type(kept) or isinstance(kept, dict)


@pytest.mark.parametrize(("name", "text"), UNREADABLE)
def test_an_unreadable_environment_variable_is_named_in_the_error(name, text):
    variable = f"DBO_{name.upper()}"
    where = f"{name}={text!r} (from the environment variable {variable}): expected "
    with pytest.raises(ValueError, match=re.escape(where)):
        Config.from_options({}, {variable: text})


def test_the_environment_overrides_options_but_an_empty_variable_is_none_at_all():
    options = {"split": "always", "min_tokens": 5, "policy": "alternate"}
    environ = {"DBO_SPLIT": "never", "DBO_MIN_TOKENS": "", "DBO_LOGS": "debug"}
    assert Config.from_options(options, environ) == Config(split="never", min_tokens=5, policy="alternate")


def test_a_wrong_option_is_refused_even_where_the_environment_overrides_it():
    with pytest.raises(ValueError, match="from options"):
        Config.from_options({"split": "sometimes"}, {"DBO_SPLIT": "never"})


def test_the_environment_of_the_process_is_the_default(monkeypatch):
    monkeypatch.setenv("DBO_SPLIT", "never")
    assert Config.from_options({"split": "always"}).split == "never"


def test_an_unknown_option_is_an_error_that_names_the_nearest_one_and_lists_all():
    expected = f"unknown option 'num_microbatch'; did you mean 'num_microbatches'? The options are: {', '.join(NAMES)}"
    with pytest.raises(ValueError, match=exactly(expected)):
        Config.from_options({"num_microbatch": 3}, {})


def test_an_unknown_option_like_no_other_is_given_no_wild_guess():
    with pytest.raises(ValueError, match=exactly(f"unknown option 'zzz'. The options are: {', '.join(NAMES)}")):
        Config.from_options({"zzz": 3}, {})


def test_a_variable_that_is_like_none_of_ours_but_by_its_beginning_is_one_warning(caplog):
    environ = {"DBO_SPILT": "never", "DBO_LOGS": "info", "DBO_SPLIT": "always", "VLLM_DBO": "1", "DBO_ZZZ": "1"}
    with caplog.at_level("WARNING", "dbo_compile"):
        assert [Config.from_options({}, environ).split for _ in range(2)] == ["always"] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "DBO_SPILT is ignored: there is no such variable; did you mean 'DBO_SPLIT'?",
        "DBO_ZZZ is ignored: there is no such variable.",
    ]


def test_the_nearest_to_a_variable_may_be_one_that_is_no_option(caplog):
    with caplog.at_level("WARNING", "dbo_compile"):
        Config.from_options({}, {"DBO_LOG": "info"})
    assert [record.getMessage().rpartition(" ")[2] for record in caplog.records] == ["'DBO_LOGS'?"]


def test_every_variable_in_the_code_is_known(caplog):
    modules = Path(dbo_compile.__file__).parent.rglob("*.py")
    named = {name for module in modules for name in re.findall(r"\bDBO_[A-Z]\w+", module.read_text())}
    assert {"DBO_LOGS", "DBO_SPLIT", "DBO_DUMP"} <= named
    Config.from_options({}, dict.fromkeys(named, ""))
    assert caplog.records == []


def test_torch_compile_tells_of_a_wrong_option_at_the_first_call():
    compiled = torch.compile(torch.sin, backend="dbo", options={"splt": "never"})
    with pytest.raises(BackendCompilerFailed, match="ValueError: unknown option 'splt'; did you mean 'split'") as error:
        compiled(torch.ones(3))
    assert isinstance(error.value.inner_exception, ValueError)


def test_a_config_prints_in_one_line_what_differs_from_the_defaults():
    config = Config(timeout_s=7, pad_to=[257, 65], split="never", token_dims={"positions": -1, "input_ids": 0})
    assert str(Config()) == "Config()"
    assert str(config) == (
        "Config(split='never', token_dims={'input_ids': 0, 'positions': -1}, pad_to=(65, 257), timeout_s=7.0)"
    )


def test_what_a_config_was_made_of_may_change_without_changing_it():
    dims = {"input_ids": 0}
    config = Config(token_dims=dims)
    dims["positions"] = -1
    assert config.token_dims == {"input_ids": 0}
    with pytest.raises(TypeError, match="item assignment"):
        config.token_dims["positions"] = -1
    with pytest.raises(FrozenInstanceError):
        config.split = "never"


def test_a_config_hashes_pickles_and_copies():
    config = Config(token_dims={"positions": -1, "input_ids": 0}, pad_values={"slot_mapping": -1}, pad_to=(3, 5))
    same = Config(token_dims={"input_ids": 0, "positions": -1}, pad_values={"slot_mapping": -1}, pad_to=(5, 3))
    assert {config: 1}[same] == 1
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config) == config


def test_the_fingerprint_covers_exactly_what_ranks_must_share():
    other = {
        "num_microbatches": 3, "split": "always", "min_tokens": 5, "token_dims": {"ids": 0}, "pad_to": (7,),
        "pad_values": {"ids": 1}, "dp_group": "7", "dp_sync": "device", "inner": "eager", "cuda_graph": True,
        "graph_memory_gib": 0.5, "clone_outputs": False, "comm_sms": 9,
        "policy": "sequential", "gate": "never", "dump": "folder", "timeout_s": 11,
    }  # fmt: skip
    assert list(other) == NAMES
    config = Config()
    changed = [name for name in NAMES if replace(config, **{name: other[name]}).fingerprint != config.fingerprint]
    own = ("dp_group", "graph_memory_gib", "clone_outputs", "dump", "timeout_s")
    assert changed == [name for name in NAMES if name not in own]


def test_the_fingerprint_is_the_same_in_every_process_and_for_every_order_of_names():
    config = Config(token_dims={"positions": -1, "input_ids": 0}, dump="here")
    same = Config(token_dims={"input_ids": 0, "positions": -1}, dump="there")
    assert config.fingerprint == same.fingerprint == "9a9ca8a61558cd8d"

import json

import nanoengine_plugin_demo
import pytest
from nanoengine_plugin_demo.command import write_opt

from nanoengine.api import ConfigError


def test_the_command_writes_a_checkpoint_once(tmp_path, capsys):
    [spec] = nanoengine_plugin_demo.register_commands()
    assert spec.target == f"{write_opt.__module__}:{write_opt.__name__}"
    write_opt(tmp_path / "opt", layers=1)
    assert json.loads((tmp_path / "opt" / "config.json").read_text())["num_hidden_layers"] == 1
    assert capsys.readouterr().out == f"wrote {tmp_path / 'opt'}\n"
    with pytest.raises(ConfigError, match="exists already"):
        write_opt(tmp_path / "opt")

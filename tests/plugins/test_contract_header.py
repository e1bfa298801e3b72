from __future__ import annotations

import re

from toprovar.kernels import contract
from toprovar.plugins import contract_header


def test_the_committed_header_is_what_the_contract_gives():
    assert contract_header.HEADER.read_text(encoding="utf-8") == contract_header.header(), (
        "run python -m toprovar.plugins.contract_header"
    )


def test_every_output_axis_is_an_axis_of_an_input():
    # The adapters derive output shapes from this.
    for plugin in contract_header.PLUGINS:
        axes = {axis for tensor in plugin.op.inputs for axis in tensor.shape}
        for tensor in plugin.op.outputs:
            assert set(tensor.shape) <= axes, (plugin.name, tensor.name)


def test_the_type_of_every_output_is_fixed_or_that_of_the_first_input():
    for plugin in contract_header.PLUGINS:
        for tensor in plugin.op.outputs:
            assert tensor.dtype != "T" or plugin.op.inputs[0].dtype == "T", (plugin.name, tensor.name)


def test_every_creator_has_the_name_that_the_exporter_writes():
    functions = __import__("pytest").importorskip("toprovar.exporter.functions", reason="needs torch and onnxscript")
    assert {plugin.name for plugin in contract_header.PLUGINS} == set(functions.function_protos())


def test_the_check_option_notices_a_change(monkeypatch, capsys):
    assert contract_header.main(["--check"]) == 0
    monkeypatch.setattr(contract, "KERNEL_REVISION", contract.KERNEL_REVISION + 1)
    assert contract_header.main(["--check"]) == 1
    assert "python -m toprovar.plugins.contract_header" in capsys.readouterr().err


def test_the_header_names_no_machine():
    assert not re.search(r"/(home|root|work|usr)/", contract_header.header())

"""Exported objects: files, manifest, description, and their use through FLASHMLA_CUTE_OBJECTS."""

import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import pytest

from flashmla_cute import compile, export, launches, ops, resources, selection, store
from flashmla_cute.kernels.config import (
    FORMATS,
    PRESETS,
    SCALED_FORMATS,
    Fp8AppendConfig,
    Fp8Config,
    MLAConfig,
    ScheduleConfig,
    UpcastConfig,
)

ROOT = Path(__file__).parents[2]
APPEND = (ops.AppendOp, MLAConfig(causal=False))
SCHEDULE = (ops.ScheduleOp, ScheduleConfig())
DECODE = (ops.DecodeOp, MLAConfig(causal=False))
FP8_DECODE, UPCAST_DECODE = (ops.Fp8DecodeOp, Fp8Config()), (ops.Fp8DecodeOp, UpcastConfig())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """the three ops, from two processes"""
    folder = tmp_path_factory.mktemp("objects")
    export.export([APPEND, SCHEDULE, DECODE], folder)
    return folder


@pytest.fixture
def objects(exported, tmp_path, monkeypatch):
    """a copy of the exported objects, to be served"""
    folder = tmp_path / "objects"
    folder.mkdir()
    for path in exported.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setenv(compile.OBJECTS_VARIABLE, str(folder))
    monkeypatch.setattr(store, "_warned", set())
    return folder


@pytest.fixture
def no_compile(compile_cache, monkeypatch):
    def refuse(op):
        raise AssertionError(f"{op.name} {op.config.name} was compiled")

    monkeypatch.setattr(compile, "compile_object", refuse)
    return compile_cache


def manifest(folder) -> dict:
    return json.loads((folder / store.MANIFEST).read_text())


def entry_of(folder, op_class) -> dict:
    return next(entry for entry in manifest(folder)["objects"] if entry["op"] == op_class.name)


def description(folder, op_class) -> dict:
    return json.loads((folder / entry_of(folder, op_class)["files"]["description"]["name"]).read_text())


def edit_manifest(folder, change):
    content = manifest(folder)
    for entry in content["objects"]:
        change(entry)
    (folder / store.MANIFEST).write_text(json.dumps(content))


# ---------------------------------------------------------------------- files
def test_the_manifest_says_what_is_there(exported):
    objects = manifest(exported)["objects"]
    assert sorted(entry["op"] for entry in objects) == ["append", "decode", "schedule"]
    named = {store.MANIFEST, export.HEADER}
    for entry in objects:
        assert entry["symbol"] == f"__tvm_ffi_flashmla_cute_{entry['op']}_{store.key_of(entry)}"
        for file in entry["files"].values():
            assert hashlib.sha256((exported / file["name"]).read_bytes()).hexdigest() == file["sha256"]
            named.add(file["name"])
    assert named == {path.name for path in exported.iterdir()}, "nothing unfinished is left"
    assert entry_of(exported, ops.DecodeOp)["config"] == json.loads(
        json.dumps(compile.content(ops.DecodeOp(DECODE[1]))["config"])
    )


def test_no_path_of_this_machine_is_in_the_files(exported):
    for path in exported.iterdir():
        content = path.read_bytes()
        for place in (str(exported), str(ROOT), str(Path.home()), sys.prefix):
            common = len(Path(place).parts) < 3  # / or /usr
            assert common or place.encode() + b"/" not in content, f"{path.name} names {place}"


def test_cubins_are_those_of_the_objects(exported):
    for entry in manifest(exported)["objects"]:
        cubin = (exported / entry["files"]["cubin"]["name"]).read_bytes()
        assert cubin in (exported / entry["files"]["object"]["name"]).read_bytes()
        assert resources.from_cubin(cubin).keys() == {
            kernel["symbol"] for kernel in json.loads((exported / entry["files"]["description"]["name"]).read_text())["kernels"]
        }


def test_the_header_compiles(exported, tmp_path):
    compiler = export.c_compiler()
    if compiler is None:
        pytest.skip("there is no C compiler")
    import tvm_ffi.libinfo

    source = (
        '#include "flashmla_cute.h"\nvoid* used[] = {flashmla_cute_append, flashmla_cute_decode, flashmla_cute_schedule};\n'
    )
    (tmp_path / "uses.c").write_text(source)
    places = [f"-I{exported}", f"-I{tvm_ffi.libinfo.find_include_path()}", f"-I{tvm_ffi.libinfo.find_dlpack_include_path()}"]
    command = [compiler, "-Werror", "-c", *places, str(tmp_path / "uses.c"), "-o", str(tmp_path / "uses.o")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


LOAD = """
import ctypes, sys
import cutlass.runtime
(runtime,) = [path for path in cutlass.runtime.find_runtime_libraries(enable_tvm_ffi=False) if "cute_dsl_runtime" in path]
ctypes.CDLL(runtime, ctypes.RTLD_GLOBAL)
import tvm_ffi
function = getattr(tvm_ffi.load_module(sys.argv[1]), sys.argv[2].removeprefix("__tvm_ffi_"))
try:
    function()
except TypeError as error:
    print(error)
"""


def test_the_shared_library_loads_and_has_its_symbol(exported):
    entry = entry_of(exported, ops.DecodeOp)
    if "library" not in entry["files"]:
        pytest.skip("there is no C compiler")
    path = exported / entry["files"]["library"]["name"]
    run = subprocess.run([sys.executable, "-c", LOAD, str(path), entry["symbol"]], capture_output=True, text=True)
    assert "Expects 14 parameters" in run.stdout, run.stderr


def test_without_a_c_compiler_there_is_no_library(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "c_compiler", lambda: None)
    (entry,) = export.export([APPEND], tmp_path)
    assert set(entry["files"]) == {"object", "cubin", "description"} and not list(tmp_path.glob("*.so"))


def test_a_directory_is_added_to(exported, tmp_path):
    export.export([APPEND], tmp_path)
    export.export([(ops.AppendOp, MLAConfig(kv=FORMATS["float16"], causal=False))], tmp_path)
    export.export([APPEND], tmp_path)
    assert [entry["config"]["kv"]["dtype"] for entry in manifest(tmp_path)["objects"]] == ["bfloat16", "float16"]
    assert not re.search(r"define flashmla_cute_append ", (tmp_path / export.HEADER).read_text()), "which of the two?"


def test_two_configurations_of_one_name_are_refused(exported, tmp_path):
    another = (ops.AppendOp, MLAConfig(causal=False, stages=2))
    assert export.name_of(APPEND[0](APPEND[1])) == export.name_of(another[0](another[1]))
    with pytest.raises(ValueError, match="two configurations are called append-"):
        export.export([APPEND, another], tmp_path)
    with pytest.raises(ValueError, match="has another configuration called append-"):
        export.export([another], exported)


def test_a_compile_that_fails_is_reported(tmp_path):
    with pytest.raises(RuntimeError, match="1 of 2 configurations were not exported"):
        export.export([APPEND, (ops.ScheduleOp, ScheduleConfig(num_threads=0))], tmp_path)
    assert not (tmp_path / store.MANIFEST).exists()


# ---------------------------------------------------------------------- description
def test_launches_are_described_in_order(exported):
    kernels = description(exported, ops.DecodeOp)["kernels"]
    assert [kernel["kernel"] for kernel in kernels] == ["DenseDecode", "Combine"]
    attention, combine = kernels
    assert attention["block"] == [384, 1, 1] and combine["block"] == [256, 1, 1]
    assert attention["programmatic_dependent_launch"] and combine["programmatic_dependent_launch"]
    assert attention["cluster"] is None and attention["registers"] == 168 and attention["dynamic_smem"] > 200_000
    (schedule,) = description(exported, ops.ScheduleOp)["kernels"]
    assert schedule["block"] == [ScheduleConfig().num_threads, 1, 1]


def test_parameters_are_those_of_the_kernels_in_order(exported):
    attention, combine = description(exported, ops.DecodeOp)["kernels"]
    names = [parameter["name"] for parameter in attention["parameters"]]
    assert names[:2] == ["q.atom", "q.tensor"] and names[-2:] == ["scale_log2", "cap_factor"] and "block_table" in names
    assert [p["argument"] for p in combine["parameters"]] == ["o_split", "lse_split", "merges", "out", "lse"]
    for parameters in (attention["parameters"], combine["parameters"]):
        for before, after in pairwise(parameters):
            assert before["offset"] + before["size"] <= after["offset"]
        for parameter in parameters:
            last = parameter["fields"][-1]
            assert last["offset"] + last["size"] <= parameter["size"]
    (out,) = [parameter for parameter in combine["parameters"] if parameter["argument"] == "out"]
    fields = [(field["name"], field["offset"]) for field in out["fields"]]
    assert out["shape"] == ["?", "?", "?", 512] and out["stride"] == ["?", "?", "?", 1]
    assert fields == [
        ("pointer", 0),
        *((f"shape[{i}]", 8 + 4 * i) for i in range(3)),
        *((f"stride[{i}]", 24 + 8 * i) for i in range(3)),
    ]


def encoded_boxes(host_code: str) -> list[list[int]]:
    """the boxes of the TMA descriptors that the host code encodes, without the inner axis: the last constant stored into
    bytes 56.. of a descriptor, one each for the outer axes"""
    constants, places, words, order = {}, {}, {}, []
    for line in host_code.splitlines():
        if found := re.match(r"\s*(%\w+) = llvm\.mlir\.constant\((-?\d+) : i64\)", line):
            constants[found[1]] = int(found[2])
        elif found := re.match(r"\s*(%\w+) = llvm\.getelementptr (%\w+)\[0, (\d+)\] : .*!llvm\.array<16 x i64>$", line):
            places[found[1]] = (found[2], int(found[3]))
            if found[2] not in order:
                order.append(found[2])
        elif (found := re.match(r"\s*llvm\.store (%\w+), (%\w+) : i64", line)) and found[2] in places:
            words[places[found[2]]] = constants.get(found[1])
    boxes = []
    for descriptor in order:
        outer = struct.pack("<Q", words[descriptor, 7])[:4]
        boxes.append([extent + 1 for extent in outer])
    return boxes


@pytest.mark.parametrize(
    "op, maps",
    [
        *((ops.DecodeOp(MLAConfig(head_tile=head_tile)), 5) for head_tile in (0, 1, 16, 64)),
        (ops.DecodeOp(MLAConfig(fixed_pieces=True, ragged=True, head_tile=16)), 5),
        (ops.Fp8DecodeOp(Fp8Config(base=MLAConfig(head_tile=16))), 4),
        (ops.Fp8DecodeOp(Fp8Config(base=MLAConfig(page=16), q_dtype="float8_e4m3fn", q_terms=1, open_steps=6)), 4),
        (ops.Fp8DecodeOp(UpcastConfig()), 5),
        (ops.Fp8DecodeOp(UpcastConfig(base=MLAConfig(page=16, head_tile=16, q_pair=True))), 5),
    ],
    ids=lambda x: x.config.name if hasattr(x, "config") else str(x),
)
def test_tensor_maps_have_the_boxes_that_the_host_code_encodes(op, maps):
    boxes = encoded_boxes(str(compile.compile_object(op).ir_module))
    described = [[axis["box"] for axis in one["axes"][1:]] for one in launches.tensor_maps(op.config).values()]
    assert len(boxes) == len(described) == maps
    assert boxes == [box + [1] * (4 - len(box)) for box in described]


@pytest.mark.parametrize("pair, kernel", [(FP8_DECODE, "Fp8Decode"), (UPCAST_DECODE, "UpcastDecode")], ids=["flat", "scaled"])
def test_decode_over_an_e4m3_cache(tmp_path, pair, kernel):
    (entry,) = export.export([pair], tmp_path)
    assert entry["op"] == "fp8_decode" and (tmp_path / entry["files"]["object"]["name"]).exists()
    attention, combine = description(tmp_path, ops.Fp8DecodeOp)["kernels"]
    assert (attention["kernel"], combine["kernel"]) == (kernel, "Combine")
    names = [parameter["name"] for parameter in attention["parameters"]]
    assert names[:2] == ["q.atom", "q.tensor"] and "block_table" in names and names[-1] == "softmax_scale"
    assert set(attention["tensor_maps"]) == {name for name in names if name.endswith(".atom")}
    given = {parameter["argument"] for parameter in attention["parameters"]} - {None}
    wanted = {"block_table", "items", "parts", "out", "lse", "o_split", "lse_split", "softmax_scale"}
    assert given == wanted | ({"kv_scale", "q_scale"} if kernel == "Fp8Decode" else set())


def test_append_to_an_e4m3_cache(tmp_path):
    pairs = [(ops.Fp8AppendOp, Fp8AppendConfig(kv=kv)) for kv in (Fp8AppendConfig().kv, SCALED_FORMATS[4])]
    flat, scaled = export.export(pairs, tmp_path)
    assert flat["name"] != scaled["name"]
    for entry, last in ((flat, 576), (scaled, 656)):
        (kernel,) = json.loads((tmp_path / entry["files"]["description"]["name"]).read_text())["kernels"]
        (cache,) = [parameter for parameter in kernel["parameters"] if parameter["argument"] == "cache"]
        assert cache["name"] == "cache" and cache["shape"] == ["?", 64, "?", last]


def test_a_type_that_no_kernel_takes_is_refused():
    assert launches.layout("struct<(ptr<1>, struct<(struct<(i32, i32)>, i64)>)>")[1] == 24
    assert [field["offset"] for field in launches.layout("struct<(i32, struct<()>, i64)>")[0]] == [0, 8]
    with pytest.raises(ValueError, match="a kernel parameter of type f64"):
        launches.layout("struct<(i32, f64)>")


# ---------------------------------------------------------------------- served
def test_packaged_objects_come_before_the_cache(objects, no_compile):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pair in (APPEND, SCHEDULE, DECODE):
            assert compile.is_cached(*pair) and callable(compile.get(*pair))
    assert not no_compile.exists(), "nothing is written for them"


def test_several_directories_are_searched(objects, no_compile, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv(compile.OBJECTS_VARIABLE, os.pathsep.join(map(str, (tmp_path / "empty", objects))))
    with pytest.warns(RuntimeWarning, match=r"empty has no usable manifest\.json"):
        assert callable(compile.get(*APPEND))


@pytest.mark.parametrize("field", ["source", "sources", "arch", "dsl", "tvm_ffi", "flavour"])
def test_objects_of_other_sources_or_versions_are_not_used(objects, no_compile, field):
    edit_manifest(objects, lambda entry: entry.update({field: "another"}))
    with pytest.warns(RuntimeWarning, match=f"is not used, .* {field} another, here ") as caught:
        for _ in range(2):
            assert not compile.is_cached(*APPEND)
    assert len(caught) == 1, "said once"
    with pytest.raises(AssertionError, match="was compiled"):
        compile.get(*APPEND)


def test_a_packaged_object_of_other_bytes_is_not_used(objects, no_compile):
    path = objects / entry_of(objects, ops.AppendOp)["files"]["object"]["name"]
    other = objects / entry_of(objects, ops.ScheduleOp)["files"]["object"]["name"]
    path.write_bytes(other.read_bytes())
    with (
        pytest.warns(RuntimeWarning, match="is not used: has other bytes"),
        pytest.raises(AssertionError, match="was compiled"),
    ):
        compile.get(*APPEND)
    assert path.exists(), "packaged objects are only read"


def test_a_packaged_object_of_another_configuration_is_not_used(objects, no_compile):
    """whoever forges the digest too: the symbol is not there"""
    other = entry_of(objects, ops.ScheduleOp)["files"]["object"]
    edit_manifest(objects, lambda entry: entry["files"].update(object=other))
    with pytest.warns(RuntimeWarning, match="lacks flashmla_cute_append"), pytest.raises(AssertionError, match="was compiled"):
        compile.get(*APPEND)


@pytest.mark.parametrize("content", ["", "[]", '{"format": 2, "objects": []}', '{"format": 1, "objects": [{"op": "append"}]}'])
def test_a_foreign_manifest_is_not_used(objects, no_compile, content):
    (objects / store.MANIFEST).write_text(content)
    with pytest.warns(RuntimeWarning, match="has no usable manifest"):
        assert not compile.is_cached(*APPEND)


# ---------------------------------------------------------------------- the command line
def test_configurations_by_name():
    assert selection.parse("schedule") == [SCHEDULE] and selection.parse("append") == [APPEND]
    assert selection.parse("kv=float16,causal=false,head_tile=16") == [
        (ops.DecodeOp, MLAConfig(kv=FORMATS["float16"], causal=False, head_tile=16))
    ]
    assert selection.parse("schedule:item_tiles=5") == [(ops.ScheduleOp, ScheduleConfig(item_tiles=5))]
    assert selection.parse("dense_*") == [(ops.DecodeOp, config) for config in PRESETS]
    assert set(selection.default()) >= {SCHEDULE, APPEND, DECODE}


def test_configurations_of_e4m3_caches_by_name():
    parsed = lambda word: selection.parse(word)[0][1]
    assert selection.parse("fp8_decode") == [FP8_DECODE] and selection.parse("fp8_decode:scales=4") == [UPCAST_DECODE]
    assert parsed("fp8_decode:scales=1") == UPCAST_DECODE[1], "one kernel reads both"
    quantised = parsed("fp8_decode:q=float8_e4m3fn,causal=false,page=128")
    assert (quantised.q_dtype, quantised.q_terms, quantised.base.page, quantised.base.causal) == (
        "float8_e4m3fn",
        1,
        128,
        False,
    )
    half = parsed("fp8_decode:kv=float16,terms=1")
    assert (half.q_dtype, half.q_terms, half.base.kv) == ("float16", 1, FORMATS["float16"])
    assert parsed("fp8_append:scales=4,source=float16,page=16") == Fp8AppendConfig(SCALED_FORMATS[4], "float16", 16)
    assert parsed("fp8_append") == Fp8AppendConfig()


@pytest.mark.parametrize(
    "word, message",
    [
        ("dense", "dense is no configuration"),
        ("colour=red", "colour is no field of MLAConfig"),
        ("causal=maybe", "causal is maybe; allowed: true"),
        ("stages=three", "stages is three; allowed: a value of type int"),
        ("kv=fp4", "kv is fp4; allowed: bfloat16"),
        ("head_tile=7", "head_tile is 7; allowed: 0"),
        ("fp8_decode:scales=2", "scales is 2; allowed: 0, 4, 1"),
        ("fp8_decode:scales=4,terms=1", "scales is 4; allowed: 0 with q or terms"),
        ("fp8_decode:colour=red", "colour is no field of MLAConfig"),
        ("fp8_append:colour=red", "colour=red is no field of Fp8AppendConfig; allowed: source, scales, page"),
    ],
)
def test_wrong_configurations(word, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        selection.parse(word)


def test_the_command(tmp_path, capsys):
    pytest.importorskip("rich")
    from flashmla_cute import cli

    assert cli.main(["export", "append", "--out", str(tmp_path / "objects")]) == 0
    assert entry_of(tmp_path / "objects", ops.AppendOp)["symbol"] in capsys.readouterr().out
    assert cli.main(["export", "append:stages=2", "--out", str(tmp_path / "objects")]) == 1
    assert "has another configuration" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", "nothing", "--out", str(tmp_path)])
    assert caught.value.code == 2 and "nothing is no configuration" in capsys.readouterr().err

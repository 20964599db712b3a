import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

GIB = 1024**3
READ = """
import dataclasses, json, sys
from autobatch.devices.nvml import read_gpu
print(json.dumps(dataclasses.asdict(read_gpu(*json.loads(sys.argv[1])))))
"""


@pytest.fixture(scope="session")
def stub_folder(tmp_path_factory):
    """A folder with a libnvidia-ml.so.1 that the real `pynvml` loads."""
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("gcc is needed to compile the stand-in for libnvidia-ml")
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).with_name("nvml_stub.c")
    subprocess.run(
        [gcc, "-shared", "-fPIC", "-Wall", "-Werror", source, "-o", folder / "libnvidia-ml.so.1"], check=True
    )
    return folder


def read(folder, uuid="1111", bus="00000000:3B:00.0", **answers):
    """`read_gpu` in a process whose loader finds the stub (or, with an empty folder, nothing)."""
    settings = {f"STUB_{name.upper()}": str(value) for name, value in answers.items()}
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps([uuid, bus])],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder), **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_reading_has_all_that_the_driver_says(stub_folder):
    bytes_held = {"total": 25 * GIB, "free": 20 * GIB, "reserved": GIB, "pids": f"7:{3 * GIB},8:{GIB}"}
    reading = read(stub_folder, **bytes_held, mig_mode=0, mig_slice=0)
    assert reading == {
        "name": "Stub GPU",
        "uuid": "GPU-1111",
        "driver": "580.65.06",
        "mig": False,
        "total_bytes": 25 * GIB,
        "free_bytes": 20 * GIB,
        "used_bytes": 4 * GIB,
        "reserved_bytes": GIB,
        "processes": [{"pid": 7, "used_bytes": 3 * GIB}, {"pid": 8, "used_bytes": GIB}],
        "warnings": [],
    }


@pytest.mark.parametrize("code", [3, 13, 25], ids=["not supported", "function not found", "version mismatch"])
def test_an_old_driver_counts_what_it_keeps_for_itself_as_used(stub_folder, code):
    reading = read(stub_folder, total=25 * GIB, free=20 * GIB, reserved=GIB, memory_v2=code)
    assert (reading["used_bytes"], reading["reserved_bytes"], reading["warnings"]) == (5 * GIB, None, [])


def test_an_idle_gpu_has_no_processes(stub_folder):
    assert read(stub_folder, total=GIB, free=GIB)["processes"] == []


def test_a_process_whose_memory_is_hidden_is_still_listed(stub_folder):
    assert read(stub_folder, pids="7:-1")["processes"] == [{"pid": 7, "used_bytes": None}]


def test_the_gpu_is_found_by_its_bus_where_the_uuid_is_unknown(stub_folder):
    assert read(stub_folder, uuid="9999", total=GIB)["total_bytes"] == GIB
    assert read(stub_folder, uuid=None, total=GIB)["total_bytes"] == GIB


def test_another_gpu_is_never_taken_for_it(stub_folder):
    reading = read(stub_folder, uuid="9999", bus="00000000:AF:00.0", total=GIB)
    assert reading["total_bytes"] is None
    assert "does not know the GPU 9999" in reading["warnings"][0]


def test_a_slice_of_a_partitioned_gpu_is_found_by_its_own_uuid(stub_folder):
    reading = read(stub_folder, uuid="2222", total=GIB, mig_slice=1, own_uuid="MIG-2222")
    assert (reading["mig"], reading["total_bytes"], reading["uuid"]) == (True, GIB, "MIG-2222")


def test_the_whole_of_a_partitioned_gpu_does_not_lend_its_figures_to_a_slice(stub_folder):
    reading = read(stub_folder, uuid="2222", total=80 * GIB, mig_mode=1, mig_slice=0)
    assert (reading["mig"], reading["total_bytes"], reading["processes"]) == (True, None, None)
    assert "partitioned" in reading["warnings"][0]


@pytest.mark.parametrize(
    ("answers", "warning"),
    [
        ({"init": 18}, "the driver was updated"),
        ({"init": 4}, "this user may not ask the driver"),
        ({"init": 9}, "the driver is not loaded"),
        ({"init": 999}, "Unknown Error"),
        ({"find": 15}, "GPU is lost"),
        ({"memory": 3}, "does not tell its memory of the GPU (Not Supported)"),
        ({"processes": 4}, "does not tell its processes of the GPU (Insufficient Permissions)"),
    ],
)
def test_whatever_the_driver_refuses_is_a_warning(stub_folder, answers, warning):
    assert warning in " ".join(read(stub_folder, **answers)["warnings"])


def test_a_refused_answer_does_not_hide_the_others(stub_folder):
    reading = read(stub_folder, total=GIB, free=GIB, processes=3)
    assert (reading["processes"], reading["free_bytes"]) == (None, GIB)


def test_no_library_is_a_warning(tmp_path):
    if "NVML is not available" not in " ".join(read(tmp_path)["warnings"]):
        pytest.skip("this machine has its own libnvidia-ml")
    assert "libnvidia-ml is not there" in read(tmp_path)["warnings"][0]

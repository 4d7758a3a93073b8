"""The tests of the maths and of the trainers, with the device that KLX_TEST_DEVICE names."""

import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from xml.etree import ElementTree

from gpu_check import ROOT, Report, Settings, last_words, run

FILES = (
    *("test_kl_math", "test_bf16", "test_fixed_points", "test_kl_control", "test_moments"),
    *("test_grpo", "test_grpo_parity", "test_dpo", "test_dpo_parity"),
    *("test_ppo", "test_ppo_loss", "test_ppo_oracle", "test_ppo_parity", "test_ppo_rewards"),
)
TRIED = ("test_moments", "test_ppo_loss")
WORKERS = 12
_ELSEWHERE = "not processes and not hub and not browser"  # what starts processes of its own is on the CPU


def check(settings: Settings, report: Report) -> None:
    from trl_klx.trainers.seams import TRL_HAS_PPO

    names = TRIED if settings.is_try else FILES
    names = [
        name
        for name in names
        if (ROOT / "tests" / f"{name}.py").exists() and (TRL_HAS_PPO or name != "test_ppo_parity")
    ]
    folder = settings.folder("tests")
    here = os.pathsep.join(filter(None, (str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    variables = {"KLX_TEST_DEVICE": settings.device, "OMP_NUM_THREADS": "1", "PYTHONPATH": here}
    shared = importlib.util.find_spec("xdist") is not None and not settings.is_try
    groups = [names] if shared else [[name] for name in names]

    def run_group(group: list[str]) -> tuple[str, int]:
        name = "all" if shared else group[0]
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", _ELSEWHERE, f"--junitxml={folder}/{name}.xml"]
        command += ["-n", str(WORKERS)] if shared else []
        command += [f"tests/{file}.py" for file in group]
        return name, run(command, folder / f"{name}.log", **variables)

    with ThreadPoolExecutor(1 if shared or settings.is_try else WORKERS) as pool:
        for name, status in pool.map(run_group, groups):
            path = folder / f"{name}.xml"
            if not path.exists():
                report.add(name, f"ended with {status}: {last_words(folder / f'{name}.log')}", "ends with 0", False)
                continue
            (suite,) = ElementTree.parse(path).getroot().iter("testsuite")
            ran = int(suite.get("tests", 0)) - int(suite.get("skipped", 0))
            failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            report.add(name, f"{ran} tests, {failed} failed", "none failed", status == 0 and ran > 0)
            for case in suite.iter("testcase"):
                if case.find("failure") is not None or case.find("error") is not None:
                    report.add(f"{case.get('classname')}::{case.get('name')}", "failed", "passes", False)

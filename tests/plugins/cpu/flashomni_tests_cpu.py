"""A platform for vLLM-Omni, which has none for CPUs, by its own entry point for platforms.

It says where tensors live and how much memory there is. It lies on the path of the tests alone.
"""


def vllm() -> str:
    return "vllm.platforms.cpu.CpuPlatform"


def vllm_omni() -> str:
    return "flashomni_tests_cpu_platform.Platform"

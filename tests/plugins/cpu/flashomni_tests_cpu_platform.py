"""See flashomni_tests_cpu: loaded when vLLM-Omni asks for it, and not before."""

import psutil
import torch
from vllm.platforms.cpu import CpuPlatform
from vllm_omni.platforms.interface import OmniPlatform, OmniPlatformEnum


class Platform(OmniPlatform, CpuPlatform):
    _omni_enum = OmniPlatformEnum.OOT
    device_control_env_var = "FLASHOMNI_TESTS_CPU"

    @classmethod
    def get_torch_device(cls, local_rank=None):
        return torch.device("cpu")

    @classmethod
    def get_device_count(cls):
        return 1

    @classmethod
    def supports_torch_inductor(cls):
        return False

    @classmethod
    def get_free_memory(cls, device=None):
        return psutil.virtual_memory().available

    @classmethod
    def max_memory_allocated(cls, device=None):
        return 0

    @classmethod
    def nothing(cls, *args):
        """A CPU computes at once, and torch keeps no pool of its memory."""

    set_device = synchronize = empty_cache = reset_peak_memory_stats = nothing
    max_memory_reserved = max_memory_allocated

"""Policies: what samples completions and scores them (see :mod:`rlrf.policy`)."""

from rlrf_trainers.policies.hf import HFPolicy

__all__ = ["HFPolicy"]

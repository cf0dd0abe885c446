"""Predicts time, memory and traffic of every layout of a registered model on a machine. Imports no torch, no model."""

from common.registry.forks import Model, Size, get_model, model_names
from common.registry.layout import Layout
from planner.hardware import Profile, get_profile
from planner.layouts import Plan, choose_layout, plan
from planner.model import Prediction, predict

__all__ = [
    "Layout",
    "Model",
    "Plan",
    "Prediction",
    "Profile",
    "Size",
    "choose_layout",
    "get_model",
    "get_profile",
    "model_names",
    "plan",
    "predict",
]

"""Predicts time, memory and traffic of every layout of a model on a machine. Imports no torch."""

from common.layout import Layout
from planner.hardware import Profile, get_profile
from planner.layouts import Plan, choose_layout, chooser, plan
from planner.model import Prediction, predict
from planner.models import MODELS, Model, Size, get_model

__all__ = [
    "MODELS",
    "Layout",
    "Model",
    "Plan",
    "Prediction",
    "Profile",
    "Size",
    "choose_layout",
    "chooser",
    "get_model",
    "get_profile",
    "plan",
    "predict",
]

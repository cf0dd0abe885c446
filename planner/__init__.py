"""Predicts time, memory and traffic of every layout of a model on a machine. Imports no torch."""

from planner.cost import Degrees
from planner.hardware import Profile, get_profile
from planner.layouts import Plan, choose_layout, chooser, plan
from planner.model import Prediction, predict
from planner.models import MODELS, Model, Size, get_model

__all__ = [
    "MODELS",
    "Degrees",
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

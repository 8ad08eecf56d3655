"""Guidance: denoisers made from the answers of others. Nothing of it reaches into networks or samplers."""

from videodiff.diffusion.guidance.autoguidance import Autoguidance
from videodiff.diffusion.guidance.classifier import ClassifierGuidance, class_log_prob, class_logits, classifier_loss
from videodiff.diffusion.guidance.classifier_free import ClassifierFree

__all__ = [
    "Autoguidance",
    "ClassifierFree",
    "ClassifierGuidance",
    "class_log_prob",
    "class_logits",
    "classifier_loss",
]

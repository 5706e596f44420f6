"""Figures of closed rounds, written to TensorBoard, Weights & Biases and MLflow through their own clients."""

from online_dpo.tracking.following import Tracking as Tracking
from online_dpo.tracking.following import missing_clients as missing_clients
from online_dpo.tracking.following import open_tracking as open_tracking

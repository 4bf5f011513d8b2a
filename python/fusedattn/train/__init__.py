"""The training loop: one for pre-training and fine-tuning, with checkpoints and a history."""

from fusedattn.train.config import TrainingConfig
from fusedattn.train.evaluation import evaluate, evaluate_masked
from fusedattn.train.files import CHECKPOINT, HISTORY, plot_history, read_history, remove_checkpoint
from fusedattn.train.model import Loss, Model, Reduce, Sums
from fusedattn.train.rates import layer_rates
from fusedattn.train.trainer import Trainer, TrainingResult

__all__ = [
    "CHECKPOINT",
    "HISTORY",
    "Loss",
    "Model",
    "Reduce",
    "Sums",
    "Trainer",
    "TrainingConfig",
    "TrainingResult",
    "evaluate",
    "evaluate_masked",
    "layer_rates",
    "plot_history",
    "read_history",
    "remove_checkpoint",
]

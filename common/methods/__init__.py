"""The methods by name. One small file each; `method.py` is the protocol they stand behind."""

from common.methods.balanced import Balanced
from common.methods.fedavg import FedAvg
from common.methods.fedavg_ft import FedAvgTuned
from common.methods.fedloge import FedLoGe
from common.methods.fedrod import FedRoD
from common.methods.method import Method

METHODS: dict[str, type[Method]] = {method.name: method for method in (FedAvg, FedAvgTuned, Balanced, FedRoD, FedLoGe)}

"""The methods by name. One small file each; `method.py` is the protocol they stand behind."""

from common.methods.apfl import APFL
from common.methods.balanced import Balanced
from common.methods.creff import CReFF
from common.methods.ditto import Ditto
from common.methods.fedavg import FedAvg
from common.methods.fedavg_ft import FedAvgTuned
from common.methods.fedbabu import FedBABU
from common.methods.fedbn import FedBN
from common.methods.fedetf import FedETF
from common.methods.fedlc import FedLC
from common.methods.fedloge import FedLoGe
from common.methods.fedloge_plus import FedLoGePlus
from common.methods.fedper import FedPer
from common.methods.fedprox import FedProx
from common.methods.fedrep import FedRep
from common.methods.fedrod import FedRoD
from common.methods.local import Local
from common.methods.method import Method

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Local,
        FedAvg,
        FedAvgTuned,
        FedProx,
        FedPer,
        FedRep,
        FedBABU,
        FedBN,
        Ditto,
        APFL,
        FedLC,
        Balanced,
        FedRoD,
        FedETF,
        CReFF,
        FedLoGe,
        FedLoGePlus,
    )
}

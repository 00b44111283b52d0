"""What a federation costs beyond training, measured on one machine: `fedloge bench NAME`.

overhead   seconds a round: resident nodes and the round loop of this project, against stock `flower-supernode` and
           Flower's own FedAvg, against a bare gRPC stream of the same bytes (the floor of any system like these)
memory     peak memory of the ServerApp, by the number of sites
idle       processor cores the SuperLink needs while all sites wait
dead       memory of the SuperLink over many rounds while one site is dead

Real processes on the loopback, TLS and keys on, the SuperLink in memory. Our side is what runs in production: the
resident node with its app and its store, the round loop over the fleet. Only the local training is replaced, by a
change of every value, another one at each site because equal replies would be uploaded once. The stock app does the
same in plain numpy, without torch, which is in its favour: a stock node starts a new process for every message. On
neither side are there checkpoints or evaluation.
"""

"""Pods in the lab: two nodes with containerd, the kubelet's part of it played by the lab.

cri.py         as much of the CRI as is needed, over gRPC
image.py       the images of the containers, made of the machine's own files
node.py        containerd, CNI and natkeep-cni at one host
move.py        a scenario's pods: the engine and the translator in the place of the usual ones
fleet.py       the same by agents, and a store
neighbours.py  what else a cluster has: services, policies, peers that are pods
"""

"""the CNI plugin: prepares the destination of a move in the namespace of the pod that is to come.

`natkeep-cni` is its front, in sh: of a pod without an order it says what CNI is to hear. All else
is plugin.py's.
"""

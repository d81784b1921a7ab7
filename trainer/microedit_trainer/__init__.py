"""Training side of MicroEdit: SAE training, editing, evaluation, comparison methods.

Imports microedit_vllm.artifact and the kernels; never vLLM or microedit_vllm.engine.
"""

"""What is trained: sequence encoders, the gate, the instance-wise LoRA tuner."""

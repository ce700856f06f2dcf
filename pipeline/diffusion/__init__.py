"""Diffusion mathematics: functions of tensors that know no model, no file and no cluster."""

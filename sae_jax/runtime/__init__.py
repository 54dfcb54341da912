"""The machine: devices, checkpoints, signals, disks, optional packages. Only this room knows orbax and meshes."""

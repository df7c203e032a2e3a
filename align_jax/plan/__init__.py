"""What a run will need, before it runs: `aot` compiles the real step for a topology that is not
here, `hlo` reads the compiled program, `chips` knows the hardware, `bench` measures this machine.
"""

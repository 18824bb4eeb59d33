"""The shared kitchen of all bundles, one idea per file.

In configs it is called ``scripts.common.<room>``. Rooms along the path of the data:

- `io`: case lists, a stream of cases, atomic writing, side-cars
- `phantoms`: procedural bodies, every bundle's default cohort
- `transforms`: dictionary transforms MONAI lacks
- `conditioning`: how a condition reaches the network
- `unet`: the one diffusion U-Net
- `schedules`, `solvers`: noise schedules and reverse steps
- `sampler`: the one reverse loop
- `execution`: precision, memory format, attention, compilation
- `training`: EMA, exact resume, progress, previews
- `checkpoints`: other people's weights into our networks
- `metrics`, `evaluation`: how good synthetic images are, in numbers and as a report
- `pictures`: slices, montages and GIFs as a radiologist looks at them
"""

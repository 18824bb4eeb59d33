"""The shared kitchen of all bundles, one idea per file.

In configs it is called ``scripts.common.<room>``. Rooms along the path of the data:

- `io`: case lists, atomic writing
- `cases`: a stream of cases that survives bad ones, a saver that leaves a side-car with each
- `prompts`: Siamese-Diffusion's index of masks, images and prompts
- `text`: a prompt becomes what the network attends to: numbered words, CLIP's tokens, a cache of both
- `phantoms`, `mask_phantoms`, `endoscopy_phantoms`: procedural bodies, masks and polyps, every bundle's default cohort
- `transforms`: dictionary transforms MONAI lacks
- `semantics`, `mask_statistics`: size, place and count of what masks show, and models that draw new ones
- `conditioning`: how a condition reaches the network
- `unet`, `controlnet`: the one diffusion U-Net, and the ControlNet that steers it
- `siamese`: Siamese-Diffusion's two branches and its loss
- `categorical`: diffusion of labels: scheduler, training, loss, and the loop's state
- `autoencoder`: latent diffusion's autoencoder and the scaled space of its latents
- `schedules`, `solvers`: noise schedules and reverse steps
- `sampler`: the one reverse loop
- `mask_sampler`: masks from statistics, a chain for each part
- `workflow`: the running MONAI workflow seen from inside; refuses unknown knobs
- `execution`: precision, memory format, attention, compilation
- `training`: EMA, exact resume, progress, previews
- `checkpoints`, `ldm_layout`: other people's weights into our networks
- `metrics`, `evaluation`, `mask_metrics`, `mask_evaluation`, `image_evaluation`: how good synthetic images
  and masks are, in numbers and as a report
- `downstream`: whether they help a segmenter
- `pictures`: slices, montages and GIFs as a radiologist looks at them
"""

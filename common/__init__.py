"""The shared kitchen of all bundles, one idea per file.

In configs it is called ``scripts.common.<room>``. Rooms along the path of the data:

- `io`: case lists, atomic writing
- `cases`: a stream of cases that survives bad ones, a saver that leaves a side-car with each
- `prompts`: Siamese-Diffusion's index of masks, images and prompts
- `reports`: what a radiologist would write, read and written as findings, in English and Chinese
- `text`: a text becomes what the network attends to: numbered words, a report's findings, CLIP's or BERT's tokens
- `totalsegmentator`: class tables of TotalSegmentator, and the organs we draw
- `phantoms`, `abdomen_phantoms`, `mask_phantoms`, `endoscopy_phantoms`: procedural chests, abdomens with reports, masks
  and polyps, every bundle's default cohort
- `organs`: the organ map of a CT: given, stored, or by TotalSegmentator
- `lesion_lists`, `lesion_words`, `lesion_reports`: cases of lesions, the vocabulary, reports
- `llm`, `biomedclip`: a language model that writes reports, a text tower that encodes their words
- `lesion_geometry`, `lesion_boxes`: crops of a CT and back into it; where a lesion goes, and what of a mask it is
- `lesion_phantoms`: bodies with described lesions
- `transforms`: dictionary transforms MONAI lacks
- `semantics`, `mask_statistics`: size, place and count of what masks show, and models that draw new ones
- `conditioning`: how a condition reaches the network
- `unet`, `controlnet`, `report_unet`, `attribute_unet`: the one diffusion U-Net, the ControlNet that steers it, those
  that read reports and attributes
- `siamese`: Siamese-Diffusion's two branches and its loss
- `categorical`: diffusion of labels: scheduler, training, loss, and the loop's state
- `autoencoder`, `codebook`: latent diffusion's autoencoder, one with a codebook, and the scaled space of latents
- `lesion_diffusion`: LesionDiffusion's training steps, losses, and the sampler that paints inside a mask
- `lesion_plan`, `lesion_sampler`: which lesion goes where; from a plan to the painted CT
- `schedules`, `solvers`: noise schedules and reverse steps
- `sampler`: the one reverse loop, and chains of samplers
- `slices`: a volume slice by slice, each from the one before
- `mask_sampler`: masks from statistics, a chain for each part
- `workflow`: the running MONAI workflow seen from inside; refuses unknown knobs
- `execution`: precision, memory format, attention, compilation
- `training`: EMA, exact resume, progress, previews
- `checkpoints`, `ldm_layout`: other people's weights into our networks
- `metrics`, `evaluation`, `mask_metrics`, `mask_evaluation`, `image_evaluation`, `anatomy_metrics`,
  `volume_evaluation`, `lesion_evaluation`: how good synthetic images, masks, anatomies and lesions are, in numbers
  and as a report
- `downstream`: whether they help a segmenter
- `pictures`: slices, montages and GIFs as a radiologist looks at them
"""

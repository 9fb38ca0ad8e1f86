"""A synthetic city, written as a nuScenes dataroot that the unmodified devkit loads: licence-free, any size, seeded.

The files, in the order the data flows:

    tokens     names and random streams that depend on the seed alone
    kernels    the decorator of everything compiled
    layout     a district's streets, blocks and car parks; street coordinates <-> global frame
    ground     what lies on the ground at a point (kernels)
    materials  what a surface looks like to a camera and to the LiDAR (kernels)
    shapes     solids and the vehicles and people made of them
    props      trees, buildings, street furniture
    scenery    what stands in a district for good
    traffic    routes, lane paths, speeds
    cast       who takes part in a scene
    rig        where the sensors sit and when they fire
    world      everything at one instant, packed into a grid
    raycast    where a ray meets the world (kernels)
    camera     pictures, and who is visible in them
    lidar      sweeps
    scene      district + cast + light + the ego's drive
    tables     nuScenes' thirteen tables
    filming    fires all sensors of a scene, writes their files
    outlines   polygons of what the ground consists of
    mapfile    the map expansion's file format
    expansion  the map of a district
    scene_names  what to call scenes, so that the devkit's splits find them
    city       write_city

The first run compiles the kernels (about half a minute); numba keeps them in `__pycache__`.
"""

from occfeat_targets.synth.city import write_city

__all__ = ["write_city"]

"""A licence-free, seeded synthetic city, written as a nuScenes dataroot that the unmodified devkit loads.

The files, in the order of the data flow:

    tokens     names and random generators that depend only on the seed
    kernels    the numba decorator of all kernels
    layout     a district's streets, blocks and car parks; street coordinates <-> global frame
    ground     region and paint of the ground at a point (kernels)
    materials  appearance of surfaces for cameras and LiDAR (kernels)
    shapes     solids, and vehicles and people composed of them
    props      trees, buildings, street furniture
    scenery    static objects of a district
    traffic    routes, lane paths, speeds
    cast       actors of a scene
    rig        poses and firing times of the sensors
    world      all objects at one instant, packed into a grid
    raycast    ray casting (kernels)
    camera     images, and visibility of objects
    lidar      sweeps
    scene      district + cast + light + the ego's drive
    tables     nuScenes' thirteen tables
    filming    records all sensors of a scene and writes their files
    outlines   polygons of the ground's regions
    mapfile    the map expansion's file format
    expansion  the map of a district
    scene_names  scene names of nuScenes' splits
    city       write_city

The first run compiles the kernels (about half a minute); numba caches them in `__pycache__`.
"""

from occfeat_targets.synth.city import write_city

__all__ = ["write_city"]

# CMakeLists.txt of the dome projector software: a library of sky geometry, the renderer, and a tool that packs the
# star catalogue into the binary form that the renderer maps into memory.

cmake_minimum_required(VERSION 3.24)
project(planetarium VERSION 2.3.1 LANGUAGES CXX)

option(PLANETARIUM_PROJECTORS "Build the renderer, which needs OpenGL and a display" ON)
option(PLANETARIUM_SANITIZE "Address and undefined behaviour sanitizers in debug builds" OFF)
set(PLANETARIUM_FAINTEST "6.5" CACHE STRING "Faintest stellar magnitude that goes into the packed catalogue")

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)

list(APPEND CMAKE_MODULE_PATH "${PROJECT_SOURCE_DIR}/cmake")
include(GNUInstallDirs)
include(CTest)

# Warnings for our own targets only. As an interface library they do not leak into what is fetched below.
add_library(warnings INTERFACE)
target_compile_options(warnings INTERFACE
    $<$<CXX_COMPILER_ID:GNU,Clang,AppleClang>:-Wall -Wextra -Wshadow -Wconversion>
    $<$<CXX_COMPILER_ID:MSVC>:/W4 /permissive->)

if(PLANETARIUM_SANITIZE)
    add_compile_options($<$<CONFIG:Debug>:-fsanitize=address,undefined>)
    add_link_options($<$<CONFIG:Debug>:-fsanitize=address,undefined>)
endif()

# --- sky: coordinates, precession, refraction; no dependencies ---------------------------------------------------

add_library(sky STATIC)
add_library(planetarium::sky ALIAS sky)
target_sources(sky
    PRIVATE
        src/sky/frames.cpp
        src/sky/nutation.cpp
        src/sky/refraction.cpp
    PUBLIC
        FILE_SET HEADERS
        BASE_DIRS include
        FILES include/sky/frames.hpp include/sky/nutation.hpp include/sky/refraction.hpp)
target_link_libraries(sky PRIVATE warnings)

# Fused multiply-add moves the last digit between machines, and four projectors must agree along their seams.
if(NOT MSVC)
    target_compile_options(sky PRIVATE -ffp-contract=off)
endif()

# --- packer: runs on the build machine, therefore never cross-compiled --------------------------------------------

if(CMAKE_CROSSCOMPILING)
    find_program(STARPACK starpack REQUIRED DOC "A starpack built for this machine")
    add_executable(starpack IMPORTED GLOBAL)
    set_target_properties(starpack PROPERTIES IMPORTED_LOCATION "${STARPACK}")
else()
    add_executable(starpack tools/starpack.cpp)
    target_link_libraries(starpack PRIVATE sky warnings)
endif()

set(catalogue "${PROJECT_BINARY_DIR}/stars.pack")
add_custom_command(
    OUTPUT "${catalogue}"
    COMMAND starpack --faintest "${PLANETARIUM_FAINTEST}" --output "${catalogue}" "${PROJECT_SOURCE_DIR}/data/bright_stars.csv"
    DEPENDS data/bright_stars.csv starpack
    COMMENT "Packing stars down to magnitude ${PLANETARIUM_FAINTEST}"
    VERBATIM)
add_custom_target(stars ALL DEPENDS "${catalogue}")

# --- renderer ----------------------------------------------------------------------------------------------------

if(PLANETARIUM_PROJECTORS)
    find_package(OpenGL REQUIRED COMPONENTS OpenGL)
    find_package(glfw3 3.3 QUIET)
    if(NOT glfw3_FOUND)
        message(FATAL_ERROR
            "GLFW was not found. Install it, or configure with -DPLANETARIUM_PROJECTORS=OFF to build everything "
            "that runs without a dome.")
    endif()

    add_executable(dome src/dome/main.cpp src/dome/warp_mesh.cpp src/dome/star_layer.cpp)
    target_link_libraries(dome PRIVATE sky warnings OpenGL::GL glfw)
    target_compile_definitions(dome PRIVATE DOME_VERSION="${PROJECT_VERSION}")
    add_dependencies(dome stars)
    install(TARGETS dome RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()

install(FILES "${catalogue}" DESTINATION ${CMAKE_INSTALL_DATADIR}/planetarium)

if(BUILD_TESTING)
    foreach(subject IN ITEMS frames nutation refraction)
        add_executable(test_${subject} tests/test_${subject}.cpp)
        target_link_libraries(test_${subject} PRIVATE sky warnings)
        add_test(NAME ${subject} COMMAND test_${subject})
    endforeach()
    set_tests_properties(nutation PROPERTIES TIMEOUT 60 LABELS slow)
endif()

//! Compiles konnectivity's service definition; protox reads it, so that no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let source = "proto/konnectivity.proto";
    println!("cargo::rerun-if-changed={source}");
    let descriptors = protox::compile([source], ["proto"])?;
    // Connections are served by the frontend itself, and tests dial a Unix socket: no transport of tonic's.
    tonic_prost_build::configure()
        .build_transport(false)
        .bytes(".")
        .compile_fds(descriptors)?;
    Ok(())
}

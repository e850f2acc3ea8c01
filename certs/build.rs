//! Compiles the enrolment service's definition; protox reads it, so that no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let source = "proto/corvid/enroll/v1/enroll.proto";
    println!("cargo::rerun-if-changed={source}");
    let descriptors = protox::compile([source], ["proto"])?;
    // Connections are made and served by enroll.rs itself: no transport of tonic's.
    tonic_prost_build::configure()
        .build_transport(false)
        .compile_fds(descriptors)?;
    Ok(())
}

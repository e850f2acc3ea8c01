//! Compiles the wire messages with protox, so that no protoc is needed on any machine.
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let files = protox::compile(["corvid/tunnel/v1/tunnel.proto"], ["proto"])?;
    prost_build::Config::new().compile_fds(files)?;
    println!("cargo:rerun-if-changed=proto");
    Ok(())
}

//! Devices: memory, copies, and what goes wrong with a launch.

use crate::kernels::devices;
use cuda_std::launch::LaunchConfig;
use gpu_kernels::residual::{BLOCK_DIM, RESIDUAL_ADD};
use host::device::{Device, DeviceChoice};
use host::ops;
use std::time::Duration;

#[test]
fn copies_keep_every_byte() {
    for device in devices() {
        let values: Vec<u32> = (0..100_003).map(|i: u32| i.wrapping_mul(0x9e37_79b9)).collect();
        let mut buffer = device.alloc_from(&values).unwrap();
        assert_eq!(device.to_vec(&buffer).unwrap(), values);
        assert_eq!(device.to_vec(&buffer.part(7..11)).unwrap(), values[7..11]);
        device.upload(&mut buffer.part(0..2), &[1, 2]).unwrap();
        let error = device.upload(&mut buffer, &[1, 2]).unwrap_err().to_string();
        assert_eq!(error, "an upload of 2 values into a buffer of 100003");
        assert_eq!(device.to_vec(&buffer).unwrap()[..4], [1, 2, values[2], values[3]]);
    }
}

#[test]
fn too_large_a_buffer_says_how_much_was_needed() {
    for device in devices() {
        // A petabyte: more than any device, and more than a process can address.
        let error = format!("{:#}", device.alloc::<u8>(1 << 50).unwrap_err());
        let needed =
            if device.is_cuda() { "1125899906.8 MB needed" } else { "1125899906842624 bytes needed" };
        assert!(error.contains("out of memory") && error.contains(needed), "{error}");
        assert!(!device.is_cuda() || error.contains("MB free"), "{error}");
        let error = device.alloc::<u64>(usize::MAX / 4).unwrap_err().to_string();
        assert!(error.contains("too large to address"), "{error}");
        // The device is not harmed.
        assert_eq!(device.to_vec(&device.alloc_from(&[5u8]).unwrap()).unwrap(), [5]);
    }
}

#[test]
fn a_launch_that_no_gpu_takes_is_refused() {
    for device in devices() {
        let mut x = device.alloc_from(&[1.0f32; 4]).unwrap();
        let y = device.alloc_from(&[1.0f32; 4]).unwrap();
        for (grid, block) in [(1, 2048), (0, BLOCK_DIM as u32)] {
            let config = LaunchConfig {
                grid: [grid, 1, 1],
                block: [block, 1, 1],
                dynamic_shared_bytes: 0,
                cluster: 1,
            };
            // SAFETY: the lengths are the buffers'; only the configuration is wrong.
            let result = unsafe { device.launch(&RESIDUAL_ADD, config, (x.as_mut_ptr(), y.as_ptr(), 4)) };
            let error = format!("{:#}", result.unwrap_err());
            assert!(error.contains("residual_add"), "{error}");
        }
        assert_eq!(device.to_vec(&x).unwrap(), [1.0; 4]);
    }
}

#[test]
fn marks_are_as_far_apart_as_time_is() {
    for device in devices() {
        let start = device.mark().unwrap();
        device.synchronize().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let end = device.mark().unwrap();
        let us = device.microseconds_between(&start, &end).unwrap();
        assert!((19_000.0..10_000_000.0).contains(&us), "{us} us, {}", device.describe());
    }
}

#[test]
fn what_is_left_out_of_a_recording_is_not_replayed() {
    for device in devices() {
        let mut x = device.alloc_from(&[1.0f32; 4]).unwrap();
        let [once, never] = [10.0f32, 100.0].map(|value| device.alloc_from(&[value; 4]).unwrap());
        ops::residual_add(device, &mut x, &once).unwrap();
        let issue = || {
            for (y, leave_out) in [(&once, false), (&never, true), (&once, false)] {
                device.leave_out(leave_out);
                ops::residual_add(device, &mut x, y)?;
            }
            Ok::<_, anyhow::Error>(())
        };
        // SAFETY: the recording ends before the buffers do.
        let recording = unsafe { device.record(issue) }.unwrap();
        assert_eq!(recording.is_some(), device.is_cuda());
        if let Some(recording) = recording {
            assert_eq!(device.to_vec(&x).unwrap(), [11.0; 4]);
            device.replay(&recording).unwrap();
            assert_eq!(device.to_vec(&x).unwrap(), [31.0; 4]);
            // Only of that recording.
            ops::residual_add(device, &mut x, &never).unwrap();
            assert_eq!(device.to_vec(&x).unwrap(), [131.0; 4]);
        }
    }
}

#[test]
fn cuda_without_a_gpu_says_what_is_missing() {
    if let Err(error) = Device::open(DeviceChoice::Cuda) {
        let error = format!("{error:#}");
        assert!(error.contains("NVIDIA") || error.contains("compute capability"), "{error}");
        let fallback = Device::open(DeviceChoice::Auto).unwrap().describe();
        assert!(fallback.starts_with("CPU") && fallback.contains(&error), "{fallback}");
    }
}

#[test]
fn a_value_that_a_kernel_writes_is_waited_for_and_one_that_none_writes_is_not() {
    for device in devices() {
        let mut found = device.alloc_host::<u32>(3).unwrap();
        (0..3).for_each(|i| found.set(i, 77));
        let x = device.alloc_from(&[0.5f32, 2.5, 1.5]).unwrap();
        ops::argmax(device, &x, &mut found.as_buffer().part(1..2)).unwrap();
        assert_eq!(device.wait_for(&found, 1, 77).unwrap(), 1);
        device.synchronize().unwrap();
        let error = device.wait_for(&found, 2, 77).unwrap_err().to_string();
        assert_eq!(error, "no kernel has written value 2 that was waited for");
        assert_eq!([found.get(0), found.get(2)], [77, 77]);
    }
}

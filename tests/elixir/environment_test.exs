defmodule StarweaveImage.EnvironmentTest do
  # Not async: variables of the system's environment belong to the whole VM.
  use ExUnit.Case, async: false

  alias StarweaveImage.Environment
  alias StarweaveImage.Environment.Build

  doctest Environment

  @moduletag :tmp_dir

  setup context do
    {:ok, python} = Environment.python()

    StarweaveImage.Variables.put(%{
      "STARWEAVE_IMAGE_CACHE" => context[:tmp_dir],
      "STARWEAVE_IMAGE_PYTHON" => nil
    })

    {:ok, python: python}
  end

  describe "python/1" do
    test "says what to do where nothing is set up" do
      assert Environment.python() ==
               {:error,
                "the Python environment is not set up: run `mix image.setup` " <>
                  "(in a release: StarweaveImage.setup())"}
    end

    test "takes the option before the variable, and either before the cache" do
      [option, variable] = Enum.map(~w(sh ls), &System.find_executable/1)
      System.put_env("STARWEAVE_IMAGE_PYTHON", variable)
      assert Environment.python() == {:ok, variable}
      assert Environment.python(python: option) == {:ok, option}
      assert Environment.python(python: "sh") == {:ok, option}
    end

    test "refuses what is not an executable file, without repeating its path", %{tmp_dir: tmp_dir} do
      file = Path.join(tmp_dir, "secret")
      File.write!(file, "")

      for name <- [file, tmp_dir, "/no/such/secret"] do
        System.put_env("STARWEAVE_IMAGE_PYTHON", name)

        assert Environment.python() ==
                 {:error,
                  "the interpreter that STARWEAVE_IMAGE_PYTHON names is not an executable file"}
      end
    end

    test "takes an empty variable as not set" do
      System.put_env("STARWEAVE_IMAGE_PYTHON", "")
      assert {:error, "the Python environment is not set up" <> _} = Environment.python()
    end
  end

  describe "doctor/1" do
    test "tells what an interpreter without the packages lacks", context do
      bare = Path.join(context.tmp_dir, "bare")
      {_, 0} = System.cmd(context.python, ["-m", "venv", "--without-pip", bare])

      assert {:error, error} = Environment.doctor(python: Path.join(bare, "bin/python"))
      assert error.kind == :unavailable
      assert error.details.doctor =~ "torch is missing"
      refute Exception.message(error) =~ context.tmp_dir
    end

    test "reports on the environment in use" do
      StarweaveImage.Variables.restore()
      assert {:ok, text} = Environment.doctor()
      assert text =~ ~r/^torch +2\./m
      assert text =~ ~r/^device +\w+/m
    end
  end

  describe "the device" do
    test "is CUDA's where NVIDIA's tool lists a GPU", %{tmp_dir: tmp_dir} do
      smi = Path.join(tmp_dir, "nvidia-smi")
      System.put_env("PATH", tmp_dir <> ":" <> System.get_env("PATH"))

      program(smi, ~S|echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)"|)
      assert Build.device() == :cuda

      program(smi, ~S|echo "No devices were found"; exit 6|)
      refute Build.device() == :cuda
    end
  end

  describe "mix image.setup" do
    test "refuses what it does not know" do
      assert_raise Mix.Error, ~r/mix image.setup does not take --wheel;/, fn ->
        Mix.Tasks.Image.Setup.run(["--wheel", "folder"])
      end
    end

    test "fails with the reason, and with --check installs nothing", %{tmp_dir: tmp_dir} do
      assert_raise Mix.Error, ~r/is not set up/, fn -> Mix.Tasks.Image.Setup.run(["--check"]) end
      assert File.ls!(tmp_dir) == []

      assert_raise Mix.Error, "torch must be one of cpu, cuda, rocm, got \"gpu\"", fn ->
        Mix.Tasks.Image.Setup.run(["--torch", "gpu"])
      end
    end
  end

  defp program(path, script) do
    File.write!(path, "#!/bin/sh\n" <> script <> "\n")
    File.chmod!(path, 0o755)
  end
end

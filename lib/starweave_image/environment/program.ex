defmodule StarweaveImage.Environment.Program do
  @moduledoc false
  # Where the Python side of this library is, and how one of its programs is run.

  @spec pythonpath() :: Path.t()
  def pythonpath, do: Application.app_dir(:starweave_image, "priv/python")

  @doc """
  How an interpreter runs the command `starweave-image` of this library: its arguments, and the changes to the variables
  of the environment. Those of Python itself are the application's own and mean other programs.
  """
  @spec command([String.t()]) :: {[String.t()], [{String.t(), String.t() | nil}]}
  def command(arguments) do
    theirs = for {"PYTHON" <> _ = name, _value} <- System.get_env(), do: {name, nil}
    env = List.keystore(theirs, "PYTHONUNBUFFERED", 0, {"PYTHONUNBUFFERED", "1"})
    {[Path.join(pythonpath(), "run.py") | arguments], env}
  end

  @doc "As `System.cmd/3`, but that a program which cannot be started is no exception."
  @spec run(Path.t(), [String.t()], keyword) ::
          {Collectable.t(), non_neg_integer} | {:error, atom}
  def run(program, arguments, options) do
    System.cmd(program, arguments, options)
  rescue
    error in ErlangError -> {:error, error.original}
  end
end

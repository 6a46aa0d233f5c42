defmodule StarweaveImage.Image do
  @moduledoc """
  A finished image: the encoded file, and how it was made.

  `data` is the whole file. `parameters` is the record that the file itself holds too (unless `metadata: false`).
  `timings` are milliseconds. `notices` are sentences for a person, for example that the model does not know a word of
  the prompt.
  """

  @type format :: :png | :jpeg | :webp

  @type t :: %__MODULE__{
          id: String.t(),
          index: non_neg_integer,
          data: binary,
          format: format,
          width: pos_integer,
          height: pos_integer,
          sha256: String.t(),
          model: String.t(),
          prompt: String.t(),
          negative_prompt: String.t() | nil,
          seed: non_neg_integer,
          steps: pos_integer,
          guidance_scale: float,
          scheduler: String.t() | nil,
          parameters: map,
          timings: %{optional(atom) => non_neg_integer},
          notices: [String.t()],
          attempts: pos_integer
        }

  @enforce_keys [:id, :data, :format, :width, :height, :sha256]
  defstruct [
    :id,
    :data,
    :format,
    :width,
    :height,
    :sha256,
    :model,
    :prompt,
    :negative_prompt,
    :seed,
    :steps,
    :guidance_scale,
    :scheduler,
    index: 0,
    parameters: %{},
    timings: %{},
    notices: [],
    attempts: 1
  ]

  @doc """
  Writes the image to `path`.

  An existing file is replaced as a whole and keeps its mode and owner: no reader sees half a picture, and if the disk
  is full the old picture stays. A symbolic link stays, and its target is replaced. A device or a pipe is written to;
  writing to a pipe waits for its reader.

      iex> image = %StarweaveImage.Image{id: "a", data: "file", format: :png, width: 8, height: 8, sha256: ""}
      iex> path = Path.join(System.tmp_dir!(), "starweave_image_doctest.png")
      iex> :ok = StarweaveImage.Image.save(image, path)
      iex> {File.read!(path), File.rm!(path)}
      {"file", :ok}
  """
  @spec save(t, Path.t()) :: :ok | {:error, File.posix()}
  def save(image, path) when is_binary(path) or is_list(path),
    do: path |> IO.chardata_to_string() |> StarweaveImage.Output.write(file(image))

  def save(_image, _path), do: raise(ArgumentError, "path must be a path")

  @doc """
  The image as a `data:` URI, for an HTML page.

      iex> image = %StarweaveImage.Image{id: "a", data: "file", format: :jpeg, width: 8, height: 8, sha256: ""}
      iex> StarweaveImage.Image.to_data_uri(image)
      "data:image/jpeg;base64,ZmlsZQ=="
  """
  @spec to_data_uri(t) :: String.t()
  def to_data_uri(image) do
    data = image |> file() |> Base.encode64()
    "data:image/#{image.format};base64,#{data}"
  end

  defp file(%__MODULE__{data: data}) when is_binary(data), do: data

  defp file(_other),
    do: raise(ArgumentError, "image must be a StarweaveImage.Image with its data")

  defimpl Inspect do
    import Inspect.Algebra

    def inspect(image, opts) do
      shown = image |> Map.from_struct() |> Map.update!(:data, &{:bytes, byte_size(&1)})
      concat(["#StarweaveImage.Image<", to_doc(Map.delete(shown, :parameters), opts), ">"])
    end
  end
end

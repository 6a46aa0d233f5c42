defmodule StarweaveImage.ArgumentsTest do
  # Each argument of each public function against values of every type that it does not take. None of it needs an
  # instance: what is wrong is said before anybody is asked.
  use ExUnit.Case, async: true

  alias StarweaveImage.{Client, Environment, Error, Image}

  @png <<0x89, "PNG\r\n", 0x1A, "\n", 0::64>>
  @nowhere [instance: :no_such_instance]

  @values [
    nil: nil,
    boolean: true,
    atom: :apple,
    integer: -7,
    float: 1.5,
    empty: "",
    text: "apple pie",
    path: "pictures/apple.png",
    bytes: <<0xFF, 0xFE, 0xFD>>,
    charlist: ~c"apple",
    list: [1, 2],
    improper: [1 | 2],
    keywords: [apple: 1],
    pairs: [{"width", 64}],
    tuple: {:a, :b},
    map: %{},
    struct: URI.parse("apple.png"),
    function: &String.length/1
  ]

  # What is right for each kind of argument, by the names above; all else must be refused.
  @right [
    prompt: [:text, :path],
    options: [:map, :keywords],
    keywords: [:keywords],
    image: [],
    image_or_prompt: [:text, :path],
    num_images: [nil],
    # A dot, a hyphen and so on: `pictures/apple.png` and `apple pie` are no ids.
    id: [],
    model: [:path],
    instance: [nil, :atom],
    wait: [],
    index: [],
    # A function of one argument: String.length/1.
    progress: [:function],
    interpreter: [nil, :text, :path],
    image_data: [:empty, :text, :path, :bytes],
    to_path: [:empty, :text, :path, :bytes, :charlist, :list, :improper, :keywords, :pairs]
  ]

  defp table do
    [
      {:generate, :prompt, :prompt, &StarweaveImage.generate(&1, @nowhere)},
      {:generate, nil, :options, &StarweaveImage.generate("a", &1)},
      {:generate_many, :prompt, :prompt, &StarweaveImage.generate_many(&1, 2, @nowhere)},
      {:generate_many, :num_images, :num_images,
       &StarweaveImage.generate_many("a", &1, @nowhere)},
      {:generate_many, nil, :options, &StarweaveImage.generate_many("a", 2, &1)},
      # A list is several pictures.
      {:edit, [:image, :images], :image, &StarweaveImage.edit(&1, "a", @nowhere)},
      {:edit, :image, :image, &StarweaveImage.edit(struct(Image, data: &1), "a", @nowhere)},
      {:edit, :prompt, :prompt, &StarweaveImage.edit(@png, &1, @nowhere)},
      {:edit, nil, :options, &StarweaveImage.edit(@png, "a", &1)},
      {:inpaint, :image, :image, &StarweaveImage.inpaint(&1, @png, "a", @nowhere)},
      {:inpaint, :mask, :image, &StarweaveImage.inpaint(@png, &1, "a", @nowhere)},
      {:inpaint, :mask, :image,
       &StarweaveImage.inpaint(@png, struct(Image, data: &1), "a", @nowhere)},
      {:inpaint, :prompt, :prompt, &StarweaveImage.inpaint(@png, @png, &1, @nowhere)},
      {:inpaint, nil, :options, &StarweaveImage.inpaint(@png, @png, "a", &1)},
      {:variations, [:image, :prompt], :image_or_prompt,
       &StarweaveImage.variations(&1, @nowhere)},
      {:variations, :image, :image,
       &StarweaveImage.variations(struct(Image, data: &1), @nowhere)},
      {:variations, nil, :options, &StarweaveImage.variations("a", &1)},
      {:submit, :prompt, :prompt, &StarweaveImage.submit(&1, @nowhere)},
      {:submit, nil, :options, &StarweaveImage.submit("a", &1)},
      {:await, :id, :id, &StarweaveImage.await(&1, 1, instance: :no_such_instance)},
      {:await, :timeout, :wait, &StarweaveImage.await("a", &1, instance: :no_such_instance)},
      {:await, :instance, :instance, &StarweaveImage.await("a", 1, instance: &1)},
      {:await, nil, :options, &StarweaveImage.await("a", 1, &1)},
      {:await_many, :id, :id, &StarweaveImage.await_many(&1, 1, instance: :no_such_instance)},
      {:await_many, :timeout, :wait,
       &StarweaveImage.await_many("a", &1, instance: :no_such_instance)},
      {:await_many, :instance, :instance, &StarweaveImage.await_many("a", 1, instance: &1)},
      {:await_many, nil, :options, &StarweaveImage.await_many("a", 1, &1)},
      {:subscribe, :id, :id, &StarweaveImage.subscribe(&1, instance: :no_such_instance)},
      {:subscribe, :instance, :instance, &StarweaveImage.subscribe("a", instance: &1)},
      {:subscribe, nil, :options, &StarweaveImage.subscribe("a", &1)},
      {:unsubscribe, :id, :id, &StarweaveImage.unsubscribe(&1, instance: :no_such_instance)},
      {:unsubscribe, :instance, :instance, &StarweaveImage.unsubscribe("a", instance: &1)},
      {:unsubscribe, nil, :options, &StarweaveImage.unsubscribe("a", &1)},
      {:models, nil, :options, &StarweaveImage.models/1},
      {:models, :instance, :instance, &StarweaveImage.models(instance: &1)},
      {:cancel, :id, :id, &StarweaveImage.cancel(&1, instance: :no_such_instance)},
      {:cancel, :instance, :instance, &StarweaveImage.cancel("a", instance: &1)},
      {:cancel, nil, :options, &StarweaveImage.cancel("a", &1)},
      {:load_model, :model, :model, &StarweaveImage.load_model(&1, @nowhere)},
      {:load_model, nil, :options, &StarweaveImage.load_model("a", &1)},
      {:unload_model, :model, :model, &StarweaveImage.unload_model(&1, @nowhere)},
      {:unload_model, :timeout, :wait, &StarweaveImage.unload_model("a", timeout: &1 || -1)},
      {:unload_model, nil, :options, &StarweaveImage.unload_model("a", &1)},
      {:await_ready, :timeout, :wait,
       &StarweaveImage.await_ready(&1, instance: :no_such_instance)},
      {:await_ready, :instance, :instance, &StarweaveImage.await_ready(1, instance: &1)},
      {:await_ready, nil, :options, &StarweaveImage.await_ready(1, &1)},
      {:add_sidecar, nil, :options, &StarweaveImage.add_sidecar/1},
      {:drain_sidecar, :index, :index, &StarweaveImage.drain_sidecar(&1, @nowhere)},
      {:drain_sidecar, nil, :options, &StarweaveImage.drain_sidecar(1, &1)},
      {:resume_sidecar, :index, :index, &StarweaveImage.resume_sidecar(&1, @nowhere)},
      {:resume_sidecar, nil, :options, &StarweaveImage.resume_sidecar(1, &1)},
      {:remove_sidecar, :index, :index, &StarweaveImage.remove_sidecar(&1, @nowhere)},
      {:remove_sidecar, nil, :options, &StarweaveImage.remove_sidecar(1, &1)},
      {:setup, nil, :options, &StarweaveImage.setup/1},
      {:setup, :progress, :progress, &StarweaveImage.setup(progress: &1 || 1, check: false)},
      {:doctor, nil, :options, &Environment.doctor/1},
      {:doctor, :python, :interpreter, &Environment.doctor(python: &1)}
    ]
  end

  # A mistake in the program, of functions that return no error.
  defp raising do
    [
      {:child_spec, ~r/options/, :keywords, &StarweaveImage.child_spec/1},
      {:start_link, ~r/options/, :keywords, &StarweaveImage.start_link/1},
      {:save, ~r/image must be/, :image, &Image.save(&1, "apple.png")},
      {:save, ~r/image must be/, :image_data, &Image.save(struct(Image, data: &1), "apple.png")},
      {:save, ~r/path must be/, :to_path, &Image.save(struct(Image, data: "file"), &1)},
      {:to_data_uri, ~r/image must be/, :image, &Image.to_data_uri/1},
      {:generate!, ~r/prompt/, :prompt, &StarweaveImage.generate!(&1, @nowhere)},
      {:generate!, ~r/options/, :options, &StarweaveImage.generate!("a", &1)},
      {:status, ~r/instance/, :instance, &StarweaveImage.status(instance: &1)},
      {:status, ~r/options/, :options, &StarweaveImage.status/1},
      {:available?, ~r/options/, :options, &StarweaveImage.available?/1},
      {:available?, ~r/instance/, :instance, &StarweaveImage.available?(instance: &1)}
    ]
  end

  test "what returns errors returns one that names the argument" do
    for {function, field, kind, call} <- table(), {name, value} <- wrong(kind) do
      given = {function, field, name}
      assert {^given, {:error, %Error{kind: :invalid_request} = error}} = {given, call.(value)}
      assert {given, error.details.field in List.wrap(field || [nil])} == {given, true}
      assert {given, error.message =~ ~r/\A[a-z_]+ (must be|is required)/} == {given, true}
    end
  end

  test "what returns none raises" do
    for {function, said, kind, call} <- raising(), {name, value} <- wrong(kind) do
      {raised, message} =
        try do
          {:nothing, inspect(call.(value))}
        rescue
          error -> {error.__struct__, Exception.message(error)}
        end

      given = {function, name}
      assert {given, raised in [ArgumentError, Error], message =~ said} == {given, true, true}
    end
  end

  test "stream/2 gives the same as an event" do
    for {name, value} <- wrong(:prompt) do
      assert {^name, [{:error, %Error{kind: :invalid_request, details: %{field: :prompt}}}]} =
               {name, Enum.to_list(StarweaveImage.stream(value, @nowhere))}
    end

    for {name, value} <- wrong(:options) do
      assert {^name, [{:error, %Error{kind: :invalid_request, details: %{field: nil}}}]} =
               {name, Enum.to_list(StarweaveImage.stream("a", value))}
    end
  end

  test "every public function is in these tables" do
    covered = for {function, _, _, _} <- table() ++ raising(), do: function
    public = Keyword.keys(StarweaveImage.__info__(:functions))
    assert Enum.uniq(public) -- covered == [:stream]

    for {name, value} <- wrong(:interpreter),
        do:
          assert(
            {^name, {:error, "python must be" <> _}} = {name, Environment.python(python: value)}
          )

    for {name, value} <- wrong(:options),
        do: assert({^name, {:error, "options must be" <> _}} = {name, Environment.python(value)})
  end

  test "what a wrong value was is told, a long one by its size alone" do
    for {image, got} <- [
          {File.stream!("mix.exs"), "a File.Stream"},
          {%{path: "secret"}, "a map"},
          {"pictures/apple.png", ~s("pictures/apple.png")},
          {String.duplicate("secret/", 20), "140 bytes of text"},
          {{:ok, "apple.png"}, "something else"}
        ] do
      assert {:error, error} = StarweaveImage.edit(image, "a pear")

      assert error.message ==
               "image must be a PNG, JPEG or WebP file of at most 12 MiB, got #{got}"
    end

    assert {:error, %{message: "image is required"}} = StarweaveImage.edit(nil, "a pear")
    assert {:error, %{message: "mask is required"}} = StarweaveImage.inpaint(@png, nil, "a pear")
    assert {:error, %{message: "image is required"}} = StarweaveImage.variations(nil)
  end

  test "the name of an instance in place of the options: the error names the option" do
    said = "options must be a keyword list or a map, such as [instance: MyApp.Images]"
    assert {:error, %{message: ^said}} = StarweaveImage.await("a", 1_000, MyApp.Images)
    assert {:error, %{message: ^said}} = StarweaveImage.cancel("a", MyApp.Images)
    assert_raise ArgumentError, said, fn -> StarweaveImage.status(MyApp.Images) end
  end

  test "options of an instance: a wrong value ends the program's start with one sentence" do
    for {opts, sentence} <- [
          {[name: "images"], ~s(name must be an atom, got "images")},
          {[sidecars: 0], "sidecars must be an integer from 1 to 16"},
          {[max_queue: "64"], ~s(max_queue must be an integer from 1 to 1000000, got "64")},
          {[qeue: 1], "unknown option :qeue"},
          {[max_que: 1], "unknown option :max_que, did you mean :max_queue?"}
        ] do
      error = assert_raise ArgumentError, fn -> StarweaveImage.start_link(opts) end
      assert error.message =~ sentence
    end
  end

  test "the client answers every wrong value with a sentence" do
    for {name, value} <- wrong(:prompt) do
      assert {^name, {:error, "prompt " <> _}} = {name, Client.generate_image(value, [])}
    end

    for {name, value} <- wrong(:options), name not in [nil, :pairs] do
      assert {^name, {:error, "options must be a keyword list or a map" <> _}} =
               {name, Client.generate_image("a", value)}
    end
  end

  defp wrong(kind) do
    values = @values ++ [stream: File.stream!("mix.exs"), reference: make_ref(), pid: self()]
    Keyword.drop(values, Keyword.fetch!(@right, kind))
  end
end
